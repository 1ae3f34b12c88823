// A picture to point at, draw on and drag about. What a person does is kept in picture pixels and sent once, when
// the pointer or the key is released; Python answers with `view` (marks, bounds, words) and `mask` (a PNG).
const icon = (d) => `<svg viewBox="0 0 20 20" width="20" height="20" fill="none" stroke="currentColor" stroke-width="1.7" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">${d}</svg>`;
const ICONS = {
  plus: icon('<circle cx="10" cy="10" r="6.5"/><path d="M10 7v6M7 10h6"/>'),
  minus: icon('<circle cx="10" cy="10" r="6.5"/><path d="M7 10h6"/>'),
  box: icon('<rect x="3.5" y="4.5" width="13" height="11" rx="1" stroke-dasharray="2.6 2.2"/>'),
  brush: icon('<path d="M16.5 3.5 8.8 11.2M8.8 11.2c-2-.6-4 .6-4.2 2.8-.1 1.2-.8 1.9-1.8 2.3 2.6 1 6.6.6 7.2-2.6.2-1-.3-2-1.2-2.5z"/>'),
  eraser: icon('<path d="M8.5 16.5 3.5 11.5 11 4l5.5 5.5-7 7zM7 8l5.5 5.5M8.5 16.5h8"/>'),
  move: icon('<path d="M10 3v14M3 10h14M10 3 8 5M10 3l2 2M10 17l-2-2M10 17l2-2M3 10l2-2M3 10l2 2M17 10l-2-2M17 10l-2 2"/>'),
  undo: icon('<path d="M7 4 3.5 7.5 7 11M3.5 7.5H12a4.5 4.5 0 0 1 0 9H8"/>'),
  redo: icon('<path d="M13 4l3.5 3.5L13 11M16.5 7.5H8a4.5 4.5 0 0 0 0 9h4"/>'),
  clear: icon('<path d="M4 6h12M8 6V4h4v2M5.5 6l.8 10.5h7.4L14.5 6"/>'),
};
const TOOLS = {  // name: [key, label, what to do]
  plus: ["p", "Subject point", "Click on the subject. Another click adds to it; drag a point to shift it."],
  minus: ["n", "Not-this point", "Click on what does not belong to the subject."],
  box: ["b", "Box", "Drag a box around the subject."],
  brush: ["d", "Brush", "Paint what was missed."],
  eraser: ["e", "Eraser", "Wipe off what is too much."],
  move: ["m", "Move and resize", "Drag the subject to its new place; drag the corner to resize it about its feet."],
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const round = (v) => Math.round(v * 100) / 100;

function make(tag, attributes = {}, ...children) {
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k === "html" ? (el.innerHTML = v) : el.setAttribute(k, v);
  el.append(...children);
  return el;
}

async function bitmap(view) {  // bytes of a picture, decoded
  return view?.byteLength ? createImageBitmap(new Blob([view])) : null;
}

class Canvas {
  constructor(model, el) {
    Object.assign(this, { model, tool: "plus", radius: 0, drag: null, cursor: null, picked: null, asked: 0 });
    this.board = make("canvas", { tabindex: 0, role: "application", class: "ldc-board" });
    this.words = make("div", { class: "ldc-words", role: "status", "aria-live": "polite" });
    this.hint = make("div", { class: "ldc-hint" });
    this.bar = make("div", { class: "ldc-bar", role: "toolbar", "aria-label": "Tools of the canvas" });
    this.root = make("div", { class: "ldc", "data-lm-suppress-shortcuts": "true" }, this.bar, this.board, this.hint, this.words);
    this.buttons();
    el.append(this.root);
    this.listen();
    this.update();
    this.pictures();
  }

  buttons() {
    const button = (name, title, run) => {
      const b = make("button", { type: "button", title, "aria-label": title, "data-tool": name, html: ICONS[name] });
      b.onclick = () => { run(); this.board.focus({ preventScroll: true }); };
      this.bar.append(b);
      return b;
    };
    this.tools = Object.fromEntries(Object.entries(TOOLS).map(([t, [key, label]]) => [t, button(t, `${label} (${key.toUpperCase()})`, () => this.use(t))]));
    this.size = make("input", { type: "range", min: 1, max: 100, value: 30, title: "Width of brush and eraser ([ and ])", "aria-label": "Width of brush and eraser" });
    this.size.oninput = () => this.draw();
    this.bar.append(this.size, make("span", { class: "ldc-gap" }));
    this.back = button("undo", "Undo (Ctrl+Z)", () => this.send("undo"));
    this.forth = button("redo", "Redo (Ctrl+Y)", () => this.send("redo"));
    button("clear", "Start over; once more: an empty mask", () => this.send("clear"));
  }

  listen() {
    const { board, model } = this;
    board.onpointerdown = (e) => this.down(e);
    board.onpointermove = (e) => this.moved(e);
    board.onpointerup = (e) => this.up(e);
    board.onpointercancel = () => this.cancel();
    board.onpointerleave = () => { if (!this.drag) { this.hover = null; this.forget(); this.draw(); } };
    board.oncontextmenu = (e) => e.preventDefault();
    board.onkeydown = (e) => this.key(e);
    board.onkeyup = (e) => ARROWS[e.key] && this.pending && this.commit(this.pending);
    board.onblur = () => { this.cursor = null; this.pending && this.commit(this.pending); this.draw(); };
    this.onview = () => this.update();
    this.onpictures = () => this.pictures();
    this.onglimpse = (message, buffers) => message.do === "glimpse" && this.glimpsed(message, buffers);
    model.on("msg:custom", this.onglimpse);
    model.on("change:view", this.onview);
    model.on("change:mask change:image", this.onpictures);
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.root);
  }

  close() {
    this.observer.disconnect();
    clearTimeout(this.rest);
    this.model.off("msg:custom", this.onglimpse);
    this.model.off("change:view", this.onview);
    this.model.off("change:mask change:image", this.onpictures);
  }

  // what Python says
  update() {
    const view = this.model.get("view");
    this.marks = structuredClone(view.marks);
    [this.w, this.h] = view.size;
    this.bounds = view.bounds;
    this.board.setAttribute("aria-label", `The picture. Keys: P, N, B, D, E, M choose a tool, arrows and Enter use it, Ctrl+Z takes back. ${view.says}`);
    this.words.textContent = view.says;
    this.words.classList.toggle("ldc-error", view.wrong);
    this.back.disabled = !view.undo;
    this.forth.disabled = !view.redo;
    if (this.asked) { this.root.dataset.latency = Math.round(performance.now() - this.asked); this.asked = 0; }
    this.root.dataset.serial = view.serial;
    this.root.dataset.bounds = JSON.stringify(view.bounds);
    this.use(this.tool);
  }

  async pictures() {
    const [image, mask] = await Promise.all([bitmap(this.model.get("image")), bitmap(this.model.get("mask"))]);
    this.image = image;
    this.mask = mask;
    this.layers = null;
    this.draw();
  }

  // what a person does
  use(tool) {
    this.tool = tool;
    for (const [name, b] of Object.entries(this.tools)) b.setAttribute("aria-pressed", name === tool);
    this.hint.textContent = TOOLS[tool][2];
    this.size.hidden = tool !== "brush" && tool !== "eraser";
    this.root.dataset.tool = tool;
    this.draw();
  }

  // what a click would take, asked for where the pointer rests
  forget() { clearTimeout(this.rest); this.glimpse = null; }

  resting(p) {
    this.forget();
    const points = this.tool === "plus" || this.tool === "minus";
    if (!points || this.drag || this.marks.points.some((q) => this.near(p, q))) return;
    this.rest = setTimeout(() => this.peek(p), 120);
  }

  peek(p) {
    if (this.peeking) { this.rest = setTimeout(() => this.peek(p), 120); return; }
    this.peeking = true;
    setTimeout(() => { this.peeking = false; }, 3000);
    this.model.send({ do: "glimpse", point: [...p, this.tool === "plus" ? 1 : 0] });
  }

  async glimpsed({ point }, buffers) {
    this.peeking = false;
    const mask = buffers.length ? await bitmap(buffers[0]) : null;
    const [x, y] = this.hover ?? [NaN, NaN];
    if (!mask || !point || Math.hypot(x - point[0], y - point[1]) > 6 * this.unit) return;
    this.glimpse = this.paint((g, w, h) => {
      g.drawImage(mask, 0, 0, w, h);
      g.globalCompositeOperation = "source-in"; g.fillStyle = "#4aa3ff"; g.fillRect(0, 0, w, h);
    });
    this.root.dataset.glimpse = point;
    this.draw();
  }

  send(what, marks) {
    this.forget();
    this.asked = performance.now();
    this.model.send(marks ? { do: what, marks } : { do: what });
  }

  commit(marks) {
    this.pending = null;
    this.marks = marks;
    this.send("mark", marks);
    this.draw();
  }

  change(changes) { return { ...structuredClone(this.marks), ...changes }; }

  at(e) {  // picture pixels
    const r = this.board.getBoundingClientRect();
    return [round(clamp((e.clientX - r.left) / r.width, 0, 1) * this.w), round(clamp((e.clientY - r.top) / r.height, 0, 1) * this.h)];
  }

  get unit() { return this.w / (this.board.clientWidth || 1); }  // picture pixels of one pixel on the screen
  get brush() { return round((this.size.value / 100) ** 2 * Math.max(this.w, this.h) * 0.25 + Math.max(this.w, this.h) / 200); }
  near([x, y], p, d = 12) { return Math.hypot(x - p[0], y - p[1]) < d * this.unit; }

  down(e) {
    if (e.button > 0 || this.drag) return;
    e.preventDefault();
    this.board.focus({ preventScroll: true });
    this.board.setPointerCapture(e.pointerId);
    this.cursor = null;
    this.begin(this.at(e));
  }

  begin(p) {
    const { tool, marks } = this;
    this.drag = { from: p, to: p, id: -1 };
    if (tool === "plus" || tool === "minus") this.drag.id = this.picked = marks.points.findIndex((q) => this.near(p, q));
    if (tool === "brush" || tool === "eraser") this.drag.path = [p];
    if (tool === "box" && marks.box) {
      const [a, b, c, d] = marks.box;
      const corner = [[a, b, c, d], [c, b, a, d], [a, d, c, b], [c, d, a, b]].find((q) => this.near(p, q, 14));
      if (corner) this.drag.from = corner.slice(2);
    }
    if (tool === "move") this.drag.resize = this.bounds && this.near(p, this.place(this.handle()), 18);
    this.draw();
  }

  moved(e) {
    this.hover = this.at(e);
    if (e.pointerType !== "touch") this.resting(this.hover);
    if (this.drag) for (const each of e.getCoalescedEvents?.().length ? e.getCoalescedEvents() : [e]) this.pull(this.at(each));
    this.draw();
  }

  pull(p) {
    this.drag.to = p;
    if (this.drag.path && !this.near(p, this.drag.path.at(-1), 2)) this.drag.path.push(p);
    if (this.tool === "move" && this.bounds) this.pending = this.dragged();
  }

  dragged() {  // marks with the subject where the pointer has it
    const { from, to, resize } = this.drag;
    const { move, scale } = this.marks;
    if (!resize) return this.change({ move: [clamp(round3(move[0] + (to[0] - from[0]) / this.w), -1, 1), clamp(round3(move[1] + (to[1] - from[1]) / this.h), -1, 1)] });
    const feet = this.place(this.feet());
    const far = (q) => Math.max(1e-6, Math.hypot(q[0] - feet[0], q[1] - feet[1]));
    return this.change({ scale: clamp(round3((scale * far(to)) / far(from)), 0.1, 5) });
  }

  up(e) {
    if (!this.drag) return;
    this.pull(this.at(e));
    const { from, to, path, id } = this.drag;
    const { tool, marks, pending } = this;
    this.drag = this.pending = null;
    if (path) this.commit(this.change({ strokes: [...marks.strokes, { points: path, radius: this.brush, erase: tool === "eraser" }] }));
    else if (tool === "box") this.boxed(from, to);
    else if (tool === "move") pending && this.commit(pending);
    else if (id < 0) this.point(to);
    else if (!this.near(from, to, 3)) this.commit(this.change({ points: marks.points.map((q, i) => (i === id ? [...to, q[2]] : q)) }));
    else this.draw();
  }

  cancel() { this.drag = this.pending = null; this.draw(); }

  point(p) { this.commit(this.change({ points: [...this.marks.points, [...p, this.tool === "plus" ? 1 : 0]] })); this.picked = this.marks.points.length - 1; }

  boxed(p, q) {
    const box = [Math.min(p[0], q[0]), Math.min(p[1], q[1]), Math.max(p[0], q[0]), Math.max(p[1], q[1])];
    if (box[2] - box[0] > 4 * this.unit && box[3] - box[1] > 4 * this.unit) this.commit(this.change({ box }));
    else this.draw();
  }

  key(e) {
    const name = e.key.toLowerCase();
    const control = e.ctrlKey || e.metaKey;
    const tool = Object.keys(TOOLS).find((t) => TOOLS[t][0] === name);
    if (control && name === "z") this.send(e.shiftKey ? "redo" : "undo");
    else if (control && name === "y") this.send("redo");
    else if (control || e.altKey) return;
    else if (tool) this.use(tool);
    else if (ARROWS[e.key]) this.arrow(ARROWS[e.key], e.shiftKey ? 10 : 1);
    else if (name === "enter" || name === " ") this.enter();
    else if (name === "delete" || name === "backspace") this.remove();
    else if (name === "escape") { this.corner = null; this.cancel(); }
    else if (name === "[" || name === "]") { this.size.value = Number(this.size.value) + (name === "]" ? 5 : -5); this.draw(); }
    else if ("+-=".includes(name) && this.tool === "move") this.commit(this.change({ scale: clamp(round3(this.marks.scale * (name === "-" ? 1 / 1.1 : 1.1)), 0.1, 5) }));
    else return;
    e.preventDefault();
    e.stopPropagation();
  }

  arrow([x, y], step) {
    const pixel = Math.max(this.w, this.h) / 64;
    if (this.tool === "move") {  // sent when the key is released
      const { move } = this.pending ?? this.marks;
      this.pending = this.change({ move: [clamp(round3(move[0] + x * step * 0.01), -1, 1), clamp(round3(move[1] + y * step * 0.01), -1, 1)] });
    } else {
      const [a, b] = this.cursor ?? [this.w / 2, this.h / 2];
      this.cursor = [clamp(a + x * step * pixel, 0, this.w), clamp(b + y * step * pixel, 0, this.h)];
    }
    this.draw();
  }

  enter() {
    this.cursor ??= [this.w / 2, this.h / 2];
    const p = this.cursor.map(round);
    if (this.tool === "plus" || this.tool === "minus") this.point(p);
    else if (this.tool === "box" && !this.corner) this.corner = p;
    else if (this.tool === "box") { const from = this.corner; this.corner = null; this.boxed(from, p); }
    else if (this.tool !== "move") this.commit(this.change({ strokes: [...this.marks.strokes, { points: [p], radius: this.brush, erase: this.tool === "eraser" }] }));
    this.draw();
  }

  remove() {  // the picked point, else the last one, else the box
    const { points, box } = this.marks;
    if (points.length) this.commit(this.change({ points: points.filter((_, i) => i !== (points[this.picked] ? this.picked : points.length - 1)) }));
    else if (box) this.commit(this.change({ box: null }));
    else this.send("undo");
    this.picked = null;
  }

  // where things are
  feet() { const [a, , c, d] = this.bounds; return [(a + c) / 2, d]; }
  handle() { const [, b, c] = this.bounds; return [c, b]; }
  place([x, y]) {  // where a point of the subject is after moving and resizing
    const { move, scale } = this.pending ?? this.marks;
    const [a, b] = this.feet();
    return [a + move[0] * this.w + (x - a) * scale, b + move[1] * this.h + (y - b) * scale];
  }

  // what is seen
  paint(make_layer) {
    const c = new OffscreenCanvas(this.board.width, this.board.height);
    make_layer(c.getContext("2d"), c.width, c.height);
    return c;
  }

  prepare() {  // the dim surroundings, the outline and the subject cut out, made once for a mask
    const { image, mask } = this;
    const whole = (g, w, h) => g.drawImage(mask, 0, 0, w, h);
    const dim = this.paint((g, w, h) => { g.fillStyle = "rgba(8, 10, 20, .55)"; g.fillRect(0, 0, w, h); g.globalCompositeOperation = "destination-out"; whole(g, w, h); });
    const outline = this.paint((g, w, h) => {
      const r = 1.6 * devicePixelRatio;
      for (let k = 0; k < 16; k++) g.drawImage(mask, r * Math.cos((k * Math.PI) / 8), r * Math.sin((k * Math.PI) / 8), w, h);
      g.globalCompositeOperation = "source-in"; g.fillStyle = "white"; g.fillRect(0, 0, w, h);
      g.globalCompositeOperation = "destination-out"; whole(g, w, h);
    });
    const cut = this.paint((g, w, h) => { whole(g, w, h); g.globalCompositeOperation = "source-in"; g.drawImage(image, 0, 0, w, h); });
    this.layers = { dim, outline, cut };
  }

  draw() {
    const { board } = this;
    const width = board.clientWidth, ratio = window.devicePixelRatio || 1;
    if (!this.image || !width) return;
    board.style.aspectRatio = `${this.w} / ${this.h}`;
    const size = [Math.round(width * ratio), Math.round((width * ratio * this.h) / this.w)];
    if (board.width !== size[0] || board.height !== size[1]) { [board.width, board.height] = size; this.layers = null; }
    if (this.mask && !this.layers) this.prepare();
    const g = board.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.imageSmoothingQuality = "high";
    g.drawImage(this.image, 0, 0, board.width, board.height);
    if (this.layers) this.subject(g);
    if (this.glimpse) { g.globalAlpha = 0.45; g.drawImage(this.glimpse, 0, 0, board.width, board.height); g.globalAlpha = 1; }
    g.setTransform(board.width / this.w, 0, 0, board.height / this.h, 0, 0);
    this.signs(g);
  }

  subject(g) {
    const { board, layers } = this;
    const { move, scale } = this.pending ?? this.marks;
    const away = move[0] || move[1] || scale !== 1;
    g.globalAlpha = this.bounds ? 1 : 0.35;
    g.drawImage(layers.dim, 0, 0);
    if (away && this.bounds) {  // where it was is dim too, and the subject is lit where it goes
      g.fillStyle = "rgba(8, 10, 20, .35)"; g.fillRect(0, 0, board.width, board.height);
      g.globalAlpha = 0.5; g.drawImage(layers.outline, 0, 0); g.globalAlpha = 1;
      const [x, y] = this.place([0, 0]);
      g.setTransform(scale, 0, 0, scale, (x / this.w) * board.width, (y / this.h) * board.height);
      g.drawImage(layers.cut, 0, 0);
    }
    g.shadowColor = "rgba(0, 0, 0, .8)"; g.shadowBlur = 3;
    g.drawImage(layers.outline, 0, 0);
    g.shadowBlur = 0; g.globalAlpha = 1;
  }

  line(g, path, width, colour, dash = []) {  // twice, so that it is seen on any ground
    const u = this.unit;
    for (const [w, c] of [[width + 2, "rgba(0, 0, 0, .65)"], [width, colour]]) {
      g.lineWidth = w * u; g.strokeStyle = c; g.setLineDash(c === colour ? dash.map((v) => v * u) : []);
      g.beginPath(); path(g); g.stroke();
    }
    g.setLineDash([]);
  }

  signs(g) {
    const { drag, tool, marks, cursor } = this;
    const dragging = (i) => drag && drag.id === i && (tool === "plus" || tool === "minus");
    let box = marks.box;
    if (tool === "box" && (drag || (this.corner && cursor))) { const [p, q] = drag ? [drag.from, drag.to] : [this.corner, cursor]; box = [...p, ...q]; }
    if (box) this.line(g, () => g.rect(box[0], box[1], box[2] - box[0], box[3] - box[1]), 1.5, "white", [6, 4]);
    if (drag?.path) this.stroke(g, drag.path);
    marks.points.forEach((p, i) => this.dot(g, dragging(i) ? drag.to : p, p[2], i === this.picked));
    if (tool === "move" && this.bounds) this.grip(g);
    const round_cursor = tool === "brush" || tool === "eraser";
    const where = cursor ?? (round_cursor ? this.hover : null);
    if (where && round_cursor) this.line(g, () => g.arc(...where, this.brush, 0, 7), 1.2, "white");
    if (cursor) this.line(g, () => { const u = 9 * this.unit; g.moveTo(cursor[0] - u, cursor[1]); g.lineTo(cursor[0] + u, cursor[1]); g.moveTo(cursor[0], cursor[1] - u); g.lineTo(cursor[0], cursor[1] + u); }, 1.5, "white");
  }

  stroke(g, path) {
    g.lineCap = g.lineJoin = "round"; g.lineWidth = 2 * this.brush;
    g.strokeStyle = this.tool === "brush" ? "rgba(80, 170, 255, .6)" : "rgba(10, 10, 20, .6)";
    g.beginPath(); g.moveTo(...path[0]);
    for (const p of path.length > 1 ? path : [path[0], path[0]]) g.lineTo(...p);
    g.stroke();
  }

  dot(g, [x, y], subject, picked) {
    const u = this.unit, r = (picked ? 9 : 7.5) * u;
    g.beginPath(); g.arc(x, y, r, 0, 7);
    g.fillStyle = subject ? "#12823b" : "#b3261e"; g.fill();
    g.lineWidth = 2 * u; g.strokeStyle = "white"; g.stroke();
    g.beginPath(); g.moveTo(x - 3.5 * u, y); g.lineTo(x + 3.5 * u, y);
    if (subject) { g.moveTo(x, y - 3.5 * u); g.lineTo(x, y + 3.5 * u); }
    g.stroke();
  }

  grip(g) {  // the frame of the subject with the corner to pull
    const [a, b, c, d] = this.bounds, [x0, y0] = this.place([a, b]), [x1, y1] = this.place([c, d]), s = 6 * this.unit;
    this.line(g, () => g.rect(x0, y0, x1 - x0, y1 - y0), 1.2, "white", [4, 4]);
    g.fillStyle = "white"; g.lineWidth = 2 * this.unit; g.strokeStyle = "#1668c7";
    g.fillRect(x1 - s, y0 - s, 2 * s, 2 * s); g.strokeRect(x1 - s, y0 - s, 2 * s, 2 * s);
  }
}

const round3 = (v) => Math.round(v * 1000) / 1000;

export default {
  render({ model, el }) {
    const canvas = new Canvas(model, el);
    return () => canvas.close();
  },
};
