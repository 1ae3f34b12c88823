"""The animation on top of README: `python tests/animation.py` makes nbs/edit.webp with the shipped model, some minutes
on two CPU cores."""

from pathlib import Path

import torch
from torch.nn.functional import interpolate

from layerdiffusion import LayerDiffusion, preset
from layerdiffusion.base.core import to_pil
from layerdiffusion.base.masks import overlay
from layerdiffusion.base.sd import decode_latents

OUT = Path(__file__).resolve().parents[1] / "nbs/edit.webp"
TEXT, CELL, GAP = "a brown dog jumping in the snow", 176, 6


def strip(*images):
    "Pictures beside each other on white."
    big = [interpolate(image[None], size=CELL, mode="bicubic", antialias=True)[0].clamp(0, 1) for image in images]
    line = torch.ones(3, CELL, GAP)
    return to_pil(torch.cat([x for image in big for x in (image, line)][:-1], 2))


def frames(seeds=range(3), **changes):
    """The photo, its subject, and what the steps of Eq. 7 make of noise; the last picture stays for a while. The
    predicted x0 hardly moves after such a tuning."""
    method = LayerDiffusion.from_pretrained("mini", "cpu")
    drawn, config = [], preset("best", method.models.card, **changes)

    def watch(event):
        if event.stage == "drawing":
            drawn.append(decode_latents(method.models, event.latents))

    result = method.edit("example:dog", TEXT, seeds=seeds, config=config)
    method.sample(result.embeddings, result.difference, tuple(result.image.shape[-2:]), seeds, config, watch,
                  photo=(result.image, result.mask), reference=result.reference)
    still = [result.image, overlay(result.image, result.mask)]
    return [strip(*still, *images) for images in drawn] + [strip(*still, *result.images)]


if __name__ == "__main__":
    pictures = frames()
    pictures[0].save(
        OUT,
        save_all=True,
        append_images=pictures[1:],
        duration=[110] * (len(pictures) - 1) + [3500],
        loop=0,
        quality=82,
        method=6,
    )
    print(f"{OUT.name}: {len(pictures)} frames, {OUT.stat().st_size / 1000:.0f} KB")
