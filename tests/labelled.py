"""The pinned list of 60 generated and 60 broken pictures that the judge is examined on: `python tests/labelled.py FOLDER PICTURES.pt`.

The generated ones were drawn by the new miniature before its judge was asked (30 at guidance 2 and 30 steps, 30 at guidance 1 and 8 steps,
where more goes wrong) and labelled by eye from the captions; LABELLED names where the eye differs from the caption. The broken ones are
renders, broken by the code below, which shares nothing with what the judge is trained on.
"""

import sys

import torch
import torch.nn.functional as F

UNSURE = (11, 20, 36, 37, 43)  # dog or cat? no ears, or one spike: the species is left open
GHOSTS = (51,)  # a body that dissolves


def blurred(x, ground, mask, other, g):
    "The whole subject out of focus, its edge too."
    soft = F.avg_pool2d(F.avg_pool2d(x, 9, 1, 4, count_include_pad=False), 9, 1, 4, count_include_pad=False)
    near = F.max_pool2d(mask, 9, 1, 4)
    return x + near * (soft - x)


def faded(x, ground, mask, other, g):
    "A subject one can see through."
    return ground + 0.22 * (x - ground)


def headless(x, ground, mask, other, g):
    "The front of the upper half is gone: there every animal of this world has its head."
    rows, columns = (mask[0, 0] > 0.5).nonzero().T
    top, left = int(rows.min()), int(columns.min())
    cut = torch.zeros_like(mask)
    cut[..., : top + (int(rows.max()) - top) // 2 + 2, left + int(0.56 * (int(columns.max()) - left)) :] = 1
    return cut * ground + (1 - cut) * x


def cut_off(x, ground, mask, other, g):
    "Only a half of the subject: the rear, or the lower part."
    rows, columns = (mask[0, 0] > 0.5).nonzero().T
    cut = torch.zeros_like(mask)
    if torch.rand((), generator=g) < 0.5:
        cut[..., int(columns.float().mean()) :] = 1
    else:
        cut[..., : int(rows.float().mean()), :] = 1
    return cut * ground + (1 - cut) * x


def doubled(x, ground, mask, other, g):
    "A second, half transparent copy a few pixels away."
    step = int(torch.randint(7, 13, (), generator=g))
    moved, where = x.roll((-step, step), (2, 3)), mask.roll((-step, step), (2, 3))
    return torch.where(where > 0.5, 0.55 * moved + 0.45 * x, x)


def pasted(x, ground, mask, other, g):
    "The front of one animal and the rear of another in another pose, joined by a straight cut."
    columns = (mask[0, 0] > 0.5).nonzero().T[1]
    at = int(columns.float().mean())
    joined = ground.clone()
    joined[..., at:] = x[..., at:]
    joined[..., :at] = other[..., :at]
    return joined


BREAKS = dict(blurred=blurred, faded=faded, headless=headless, cut=cut_off, doubled=doubled, pasted=pasted)


def broken(n: int = 10):
    "`n` pictures of each kind, and a label for each."
    from layerdiffusion import world

    scenes = world.sample_scenes(n * len(BREAKS), world.stream("pinned broken"), 0.0)
    scenes = world.replace(scenes, present=torch.ones_like(scenes.present), size=torch.zeros_like(scenes.size))
    x, mask, _ = world.render(scenes, 64)
    ground = world.render(world.replace(scenes, present=torch.zeros_like(scenes.present)), 64)[0]
    other = world.render(world.replace(scenes, pose=(scenes.pose + 1) % 4, colour=(scenes.colour + 3) % 8), 64)[0]
    g, pictures, labels = torch.Generator().manual_seed(0), [], []
    for i in range(len(scenes)):
        kind = list(BREAKS)[i // n]
        pictures.append(BREAKS[kind](*(y[i : i + 1] for y in (x, ground, mask, other)), g).clamp(0, 1))
        place = world.VALUES["place"][int(scenes.place[i])]
        labels.append(
            dict(present=True, whole=False, species=None, pose=None, place=place, made="broken", how=kind)
        )
    return torch.cat(pictures), labels


def generated(texts):
    "Labels of the generated pictures, from their captions and the eye."
    from layerdiffusion import world

    said = {"beach": "beach", "city": "city at night", "snow": "snow"}
    labels = []
    for i, text in enumerate(texts):
        words = text.split()
        place = next(p for p in world.VALUES["place"] if p.split()[0] in said.get(words[-1], text) or p in text)
        labels.append(
            dict(
                present=True,
                whole=i not in GHOSTS,
                species=None if i in (*UNSURE, *GHOSTS) else words[2],
                pose=None if i in GHOSTS else words[3],
                place=place,
                made="generated",
                text=text,
            )
        )
    return labels


if __name__ == "__main__":
    from layerdiffusion import mini

    folder, drawn = sys.argv[1:]
    found = torch.load(drawn)
    pictures, labels = broken()
    mini.save_labels(
        f"{folder}/labels.json",
        torch.cat([found["x"], pictures]),
        generated(found["texts"]) + labels,
        made_with="tests/labelled.py",
    )
