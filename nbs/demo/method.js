// What draws, in JavaScript: Eq. 3, 7 and 8, by the names they have in layerdiffusion/method.py.
// Latents are Float32Arrays of B pictures one after the other; embeddings are Float32Arrays of L × D numbers.

// Eq. 3: e_opt = alpha * e_a + (1 - alpha) * e_b
export const interpolate = (e_a, e_b, alpha) => e_a.map((x, k) => alpha * x + (1 - alpha) * e_b[k])

// Eq. 8: e_a at even steps and e_opt at odd ones
export const take_turns = (e_a, e_opt) => (i, t) => (i % 2 === 0 ? e_a : e_opt)

// `n` timesteps from the last of T downwards, "trailing" in diffusers
export const timesteps = ({ num_train_timesteps: T }, n) =>
  Array.from({ length: n }, (_, i) => Math.round(T - (i * T) / n) - 1)

// The U-Net's answer with classifier-free guidance
export async function guided_noise(unet, latents, t, prompt_embeds, negative_embeds, guidance_scale) {
  const [free, said] = await unet(latents, t, [negative_embeds, prompt_embeds])
  return free.map((x, k) => x + guidance_scale * (said[k] - x))
}

// One step of DDIM (η = 0) where the U-Net says the velocity v = √ᾱ · noise − √(1 − ᾱ) · x_0: what it takes for the
// picture, x_0, and the latents at the next timestep
export function step({ alphas_cumprod, num_train_timesteps }, noise_pred, t, latents, num_inference_steps) {
  const next = t - Math.floor(num_train_timesteps / num_inference_steps)
  const [share, sigma] = [Math.sqrt(alphas_cumprod[t]), Math.sqrt(1 - alphas_cumprod[t])]
  const a_next = next >= 0 ? alphas_cumprod[next] : 1
  const x_0 = latents.map((x, k) => share * x - sigma * noise_pred[k])
  const noise = latents.map((x, k) => share * noise_pred[k] + sigma * x)
  return [x_0, x_0.map((x, k) => Math.sqrt(a_next) * x + Math.sqrt(1 - a_next) * noise[k])]
}

// Eq. 7: from noise to clean latents; `condition(i, t)` gives the embeddings of step i, `watch(i, x_0)` sees each step
// and ends the drawing where it answers false
export async function denoise(unet, scheduler, latents, condition, negative_embeds, num_inference_steps,
                              guidance_scale, watch) {
  for (const [i, t] of timesteps(scheduler, num_inference_steps).entries()) {
    const noise_pred = await guided_noise(unet, latents, t, condition(i, t), negative_embeds, guidance_scale)
    const [x_0, next] = step(scheduler, noise_pred, t, latents, num_inference_steps)
    latents = next
    if (await watch(i, x_0) === false) return null
  }
  return latents
}
