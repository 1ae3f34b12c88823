// The dials on the first page: recorded pictures until "Draw" is pressed, then drawn ones. Where a browser cannot draw,
// or the site was built without the models, the recorded ones stay.
(() => {
  const demo = document.getElementById('demo'), form = demo.querySelector('form')
  const { alpha, turns, more } = form.elements, draw = form.querySelector('[type=submit]')
  const canvases = [...demo.querySelectorAll('canvas')], count = canvases.length, edge = canvases[0].width
  const recorded = new Image()
  const workers = [], steps = []
  let id = 0, seed = 0, begun, card, hired

  const tell = text => { demo.querySelector('.demo-state').textContent = text }
  const name_seeds = () => canvases.forEach((canvas, k) => {
    canvas.nextElementSibling.textContent = `seed ${seed + k}`
    canvas.setAttribute('role', 'img')
    canvas.setAttribute('aria-label', `“${demo.querySelector('.demo-text').textContent}”, α ${alpha.value}, ` +
      `${turns.checked ? 'with' : 'without'} turns, seed ${seed + k}`)
  })

  // The recorded sheet has a column for each seed and a row for each α, with turns first and then without
  function show_recorded() {
    seed = 0
    name_seeds()
    const row = Math.round(alpha.value * 10) + (turns.checked ? 0 : 11)
    canvases.forEach((canvas, k) => canvas.getContext('2d')
      .drawImage(recorded, k * edge, row * edge, edge, edge, 0, 0, edge, edge))
    canvases.forEach(canvas => canvas.classList.remove('old'))
  }

  // Pictures (B, 3, H, W) in 0-1, from the canvas `first` on
  function show(pictures, first) {
    const area = edge * edge
    for (let k = 0; k < pictures.length / (3 * area); k++) {
      const image = new ImageData(edge, edge)
      for (let p = 0; p < area; p++) {
        for (let c = 0; c < 3; c++) image.data[4 * p + c] = 255 * pictures[(3 * k + c) * area + p]
        image.data[4 * p + 3] = 255
      }
      canvases[first + k].getContext('2d').putImageData(image, 0, 0)
      canvases[first + k].classList.remove('old')
    }
  }

  function give_up(why) {
    workers.splice(0).forEach(worker => worker.terminate())
    hired = null
    draw.hidden = more.hidden = true
    tell(`These pictures were recorded: ${why} α and the turns can be moved all the same.`)
    show_recorded()
  }

  // One part of the pictures is a step further
  function hear({ data }) {
    if (data.error) return give_up(`this browser could not draw (${data.error}).`)
    if (data.id !== id) return
    if (data.pictures) show(data.pictures, data.part * count / workers.length)
    steps[data.part] = data.step
    const least = demo.dataset.step = Math.min(...steps)
    if (least === data.steps) more.hidden = false
    tell(least < data.steps ? `Step ${least} of ${data.steps}`
      : `Drawn here in ${((performance.now() - begun) / 1000).toFixed(1)} s, ${data.steps} steps.`)
  }

  const unpacked = async name => {
    const reply = await fetch(`demo/${name}`)
    if (!reply.ok) throw new Error(`${name} is not there`)
    return new Uint8Array(await new Response(reply.body.pipeThrough(new DecompressionStream('gzip'))).arrayBuffer())
  }

  // Half of the pictures on each of two cores, and each file fetched once for both
  async function hire() {
    tell(`Fetching the models, ${card.megabytes} MB, once …`)
    const files = await Promise.all(['ort.wasm.bin', 'unet.bin', 'decoder.bin'].map(unpacked))
    for (let part = 0; part < (navigator.hardwareConcurrency > 1 ? 2 : 1); part++) {
      workers.push(new Worker('demo/worker.js', { type: 'module' }))
      workers[part].onmessage = hear
      workers[part].onerror = () => give_up('this browser cannot run the models.')
      workers[part].postMessage({ card, files })
    }
  }

  async function start() {
    const wish = ++id
    demo.dataset.step = 0
    name_seeds()
    canvases.forEach(canvas => canvas.classList.add('old'))
    try { await (hired ||= hire()) } catch (error) { return give_up(`this browser could not draw (${error.message}).`) }
    if (wish !== id) return // the dials were moved meanwhile
    tell(`Step 0 of ${card.steps}`)
    begun = performance.now()
    workers.forEach((worker, part) => {
      const share = count / workers.length
      steps[part] = 0
      worker.postMessage({ id, part, alpha: Number(alpha.value), turns: turns.checked, seed: seed + part * share,
                           count: share })
    })
  }

  form.addEventListener('input', () => { form.querySelector('output').textContent = alpha.value })
  form.addEventListener('change', () => (hired ? start() : show_recorded()))
  form.addEventListener('submit', event => { event.preventDefault(); start() })
  more.addEventListener('click', () => { seed = (seed + count) % card.seeds; start() })

  recorded.onload = show_recorded
  recorded.src = 'demo/recorded.webp'
  form.reset()
  const recording = 'These pictures were recorded.'
  if (!(window.WebAssembly && window.Worker && window.DecompressionStream)) give_up('this browser is too old to draw.')
  else fetch('demo/demo.json').then(reply => reply.ok ? reply.json() : Promise.reject()).then(found => {
    if (!found) throw 0
    card = found
    draw.hidden = false
    tell(`${recording} “Draw” makes new ones here; it fetches ${card.megabytes} MB once.`)
  }).catch(() => tell(`${recording} α and the turns can be moved; this copy of the site holds no models to draw with.`))
})()
