// Draws with the models that the page hands over once, away from the page so that it stays quick.
import * as ort from './ort.mjs'
import { denoise, interpolate, take_turns } from './method.js'

const numbers = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer)
const tensor = (data, ...shape) => new ort.Tensor('float32', data, shape)
const joined = arrays => {
  const all = new Float32Array(arrays.reduce((n, a) => n + a.length, 0))
  arrays.reduce((at, a) => (all.set(a, at), at + a.length), 0)
  return all
}

async function load(packed, [wasm, unet_file, vae_file]) {
  const card = { ...packed }
  for (const name of ['e_a', 'e_b', 'nothing', 'noise', 'alphas_cumprod']) card[name] = numbers(card[name])
  ort.env.wasm.numThreads = 1
  ort.env.wasm.wasmBinary = wasm
  const unet = await ort.InferenceSession.create(unet_file)
  const vae = await ort.InferenceSession.create(vae_file)
  return { card, unet, vae }
}

// The U-Net's answers under each of `words`, in one pass
const said_by = ({ card, unet }) => async (latents, t, words) => {
  const count = latents.length / (card.channels * card.size ** 2)
  const { noise_pred } = await unet.run({
    latents: tensor(joined(words.map(() => latents)), words.length * count, card.channels, card.size, card.size),
    t: new ort.Tensor('int64', BigInt64Array.of(BigInt(t)), []),
    words: tensor(joined(words.flatMap(e => Array(count).fill(e))), words.length * count, card.length, card.width)
  })
  return words.map((_, k) => noise_pred.data.slice(k * latents.length, (k + 1) * latents.length))
}

async function to_pictures({ card, vae }, latents) {
  const count = latents.length / (card.channels * card.size ** 2)
  const { pictures } = await vae.run({ latents: tensor(latents, count, card.channels, card.size, card.size) })
  return pictures.data
}

let models, newest = 0
onmessage = async ({ data: { card: packed, files, id, part, alpha, turns, seed, count } }) => {
  if (files) return (models = load(packed, files)).catch(() => {}) // what went wrong is told at the first wish
  newest = id
  try {
    const { card } = models = await models
    const e_opt = interpolate(card.e_a, card.e_b, alpha), each = card.channels * card.size ** 2
    const watch = async (i, x_0) => {
      await new Promise(go_on => setTimeout(go_on)) // a newer wish may have come
      if (id !== newest) return false
      const seen = (i + 1) % 2 === 0 || i + 1 === card.steps // the decoder takes a third of a step's time
      postMessage({ id, part, step: i + 1, steps: card.steps, pictures: seen && await to_pictures(models, x_0) })
    }
    const start = card.noise.slice(seed * each, (seed + count) * each)
    const condition = turns ? take_turns(card.e_a, e_opt) : () => e_opt
    await denoise(said_by(models), card, start, condition, card.nothing, card.steps, card.guidance_scale, watch)
  } catch (error) {
    postMessage({ id, error: String(error.message || error) })
  }
}
