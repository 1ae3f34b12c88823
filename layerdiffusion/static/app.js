// What only a browser can do for the editor. A picture that is chosen, dropped or pasted is sent in parts, so that no
// size of file breaks the connection; a file that Python sends is saved. The one hand with `whole` also cares for the
// page: it asks before a run is left, scrolls to results, and gives every control its name.
const PART = 1 << 20;

function make(tag, attributes = {}, ...children) {
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) el.setAttribute(k, v);
  el.append(...children);
  return el;
}

class Hand {
  constructor(model, el) {
    Object.assign(this, { model, el, ends: new AbortController() });
    this.file = make("input", { type: "file", accept: "image/*", hidden: "", "aria-label": model.get("label") });
    this.said = make("span", { class: "ld-sent", role: "status" });
    const button = make("button", { type: "button", class: "ld-choose", title: model.get("help") }, model.get("label"));
    button.onclick = () => this.file.click();
    this.file.onchange = () => { this.take(this.file.files[0]); this.file.value = ""; };
    el.append(button, this.file, this.said);
    this.heard = (message, buffers) => this.hear(message, buffers);
    model.on("msg:custom", this.heard);
    if (model.get("whole")) this.found = setInterval(() => el.closest(".ld-app") && this.care(el.closest(".ld-app")), 50);
  }

  close() {
    clearInterval(this.found);
    this.ends.abort();
    this.observer?.disconnect();
    this.model.off("msg:custom", this.heard);
  }

  // files to Python and from it
  async take(file) {
    if (!file || this.sending) return;
    this.sending = true;
    const ask = (message, buffers) => new Promise((answer) => { this.answer = answer; this.model.send(message, undefined, buffers); });
    let more = await ask({ do: "begin", name: file.name, size: file.size });
    for (let at = 0; more && at < file.size; at += PART) {
      this.said.textContent = file.size > PART ? `reading ${Math.round((100 * at) / file.size)} %` : "";
      more = await ask({ do: "part" }, [await file.slice(at, at + PART).arrayBuffer()]);
    }
    this.said.textContent = "";
    this.sending = false;
  }

  hear(message, buffers) {
    if (message.do === "answer") this.answer?.(message.more);
    if (message.do === "save") this.save(message, buffers[0]);
    if (message.do === "show") this.app?.querySelector(message.what)?.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  save({ name, type }, data) {
    const link = make("a", { download: name, href: URL.createObjectURL(new Blob([data], { type })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  // the page
  care(app) {
    clearInterval(this.found);
    this.app = app;
    this.alone = "voila" in document.body.dataset;  // no notebook around it
    if (this.alone) { document.documentElement.lang ||= "en"; document.title = "LayerDiffusion"; app.setAttribute("role", "main"); }
    const on = (what, type, act) => what.addEventListener(type, act, { signal: this.ends.signal, capture: true });
    const where = this.alone ? window : app;
    const files = (e) => [...(e.dataTransfer?.types ?? [])].includes("Files");
    on(where, "dragover", (e) => { if (files(e)) { e.preventDefault(); app.classList.add("ld-over"); } });
    on(where, "dragleave", (e) => { if (!e.relatedTarget) app.classList.remove("ld-over"); });
    on(where, "drop", (e) => { if (files(e)) { e.preventDefault(); app.classList.remove("ld-over"); this.take(e.dataTransfer.files[0]); } });
    on(document, "paste", (e) => {
      const file = [...e.clipboardData.files].find((f) => f.type.startsWith("image/"));
      if (file && (this.alone || app.contains(document.activeElement))) { e.preventDefault(); this.take(file); }
    });
    const leaving = (e) => { if (this.model.get("busy")) { e.preventDefault(); e.returnValue = true; } };
    if (this.alone) window.leaving = leaving;  // page.html asks it
    else on(window, "beforeunload", leaving);
    on(app, "click", (e) => e.target.closest(".ld-fold > button") && this.unfold(e.target.closest(".ld-fold > button")));
    on(app, "click", (e) => e.target.matches(".ld-cell img") && e.target.closest(".ld-cell").querySelector("button").click());
    on(app, "keydown", (e) => {
      if (e.key !== "Enter" || e.shiftKey || !e.target.matches(".ld-sentence textarea")) return;
      e.preventDefault();
      e.target.blur();  // the words are told before the button is pressed
      app.querySelector(".ld-go").click();
    });
    this.observer = new MutationObserver(() => { cancelAnimationFrame(this.due); this.due = requestAnimationFrame(() => this.name()); });
    this.observer.observe(app, { childList: true, subtree: true, attributes: true, attributeFilter: ["class"] });
    this.name();
  }

  unfold(button) {  // as soon as Python has opened it, bring it into view
    requestAnimationFrame(() => {
      if (!button.classList.contains("mod-active") || !button.isConnected) return;
      if (button.nextElementSibling.offsetHeight) button.parentElement.scrollIntoView({ behavior: "smooth", block: "nearest" });
      else this.unfold(button);
    });
  }

  name() {  // what ipywidgets leaves without a name or a state
    const set = (el, name, value) => el && el.getAttribute(name) !== String(value) && el.setAttribute(name, value);
    for (const row of this.app.querySelectorAll(".ld-row, .ld-field")) {
      const label = row.querySelector(".ld-label")?.textContent;
      if (label) for (const el of row.querySelectorAll("input, textarea, select, .noUi-handle")) set(el, "aria-label", label);
    }
    for (const b of this.app.querySelectorAll(".ld-fold > button")) set(b, "aria-expanded", b.classList.contains("mod-active"));
    for (const b of this.app.querySelectorAll(".widget-toggle-buttons button")) set(b, "aria-pressed", b.classList.contains("mod-active"));
    for (const img of this.app.querySelectorAll(".ld-cell img, img.ld-place")) set(img, "alt", img.closest(".ld-cell")?.querySelector("b")?.textContent ?? "The new place");
  }
}

export default {
  render({ model, el }) {
    const hand = new Hand(model, el);
    return () => hand.close();
  },
};
