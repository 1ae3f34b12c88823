"""The pinned list of 60 generated and 60 broken pictures: `python tests/labelled.py FOLDER` draws them anew with a
mini folder.

The labels stand here. They were written by looking at the pictures, before any judge was asked, so a new drawing
needs new labels.
The pictures are broken by code of its own: it works on finished pictures and masks, and knows no parts of an animal."""

import sys

import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms.functional import to_pil_image, to_tensor

from layerdiffusion.mini import training as mini
from layerdiffusion.mini import world
from layerdiffusion.base.core import package_folder
from layerdiffusion.base.masks import load_sam, propose_subject
from layerdiffusion.base.sd import load_models
from layerdiffusion.mini.world import render, sample_scenes, stream

OUT = package_folder() / "weights" / "mini" / "labels.json"
SCENES = dict(species=torch.arange(60) % 3, pose=torch.arange(60) // 3 % 4, place=torch.arange(60) * 7 // 2 % 6)
ALONE = {14: "place", 32: "place", 50: "place", 23: "subject", 41: "subject"}
KINDS = ["blurred", "faded", "headless", "cut", "doubled", "pasted"]

# What each generated picture shows, in rows of six. A + marks what is broken: no face, a ghost, a see-through one.
SEEN = """
dog standing forest, cat standing snow, rabbit standing beach, +dog sitting city, cat sitting desert,
rabbit sitting meadow,
dog lying snow, cat lying forest, rabbit lying city, dog jumping beach, cat jumping meadow, rabbit jumping desert,
dog standing forest, cat standing snow, dog standing beach, +dog sitting city, cat sitting desert,
rabbit sitting meadow,
dog lying snow, cat lying forest, rabbit lying city, dog jumping beach, cat jumping meadow, rabbit jumping beach,
dog standing forest, cat standing snow, rabbit standing beach, dog sitting city, cat sitting desert,
rabbit sitting meadow,
dog lying snow, cat lying forest, cat standing city, dog jumping beach, cat jumping meadow, rabbit jumping desert,
dog standing forest, cat standing snow, rabbit standing beach, dog sitting city, cat sitting desert,
rabbit sitting meadow,
dog lying snow, cat lying forest, +rabbit lying city, dog jumping beach, cat jumping meadow, rabbit jumping desert,
dog standing forest, cat standing snow, dog standing beach, dog sitting city, cat sitting desert, rabbit sitting meadow,
dog lying snow, cat lying forest, rabbit lying city, dog jumping beach, cat jumping meadow, rabbit jumping desert
"""


def captions():
    "Sixty captions, long and short, some of the place or of the subject alone; and the guidance of each."
    scenes = sample_scenes(60, stream("labels", 10), 0.0, **SCENES)
    everything = world.SAID + world.SAYABLE
    said = [
        ("colour",),
        everything,
        (),
        ("colour", *world.MARKS, "second"),
        ("colour",),
        world.SAID + tuple(world._BUILD),
    ]
    texts = []
    for i in range(60):
        subject = world.say_subject(scenes, i, said[i % 6])
        place = world.say_place(scenes, i, parts=i % 6 in (1, 3))
        texts.append({"place": place, "subject": subject}.get(ALONE.get(i), f"{subject} {place}"))
    return texts, [(1.0, 2.0, 3.0)[i % 3] if i % 2 else 2.0 for i in range(60)]


@torch.no_grad()
def generated(models):
    "The sixty pictures that a model draws, (60, 3, 64, 64), in 20 steps."
    texts, scales = captions()
    out = torch.zeros(60, 3, 64, 64)
    for scale in sorted(set(scales)):
        at = [i for i in range(60) if scales[i] == scale]
        for part in (at[j : j + 12] for j in range(0, len(at), 12)):
            out[part] = mini.draw(models, [texts[i] for i in part], 5_000 + part[0], scale, 20).cpu()
    return out


def seen_labels():
    "The labels of the generated pictures, read from `SEEN`."
    rows = [words.strip() for words in SEEN.strip().split(",")]
    labels = []
    for row in rows:
        species, pose, place = row.lstrip("+").split()
        labels.append(
            dict(made="generated", present=True, whole=row[0] != "+", species=species, pose=pose, place=place)
        )
    return labels


def filled(image, mask):
    "The picture without its subject: what is around it flows in."
    image, mask = image.copy(), mask.filter(ImageFilter.MaxFilter(5))
    for radius in (16, 8, 4, 2, 2, 1):
        image.paste(image.filter(ImageFilter.GaussianBlur(radius)), mask=mask)
    return image


def shape(points):
    "A polygon as a mask."
    out = Image.new("L", (64, 64))
    ImageDraw.Draw(out).polygon([tuple(p) for p in points], fill=255)
    return out


def without(image, ground, mask, area):
    "The picture with the subject gone inside an area."
    both = Image.composite(mask.filter(ImageFilter.MaxFilter(3)), Image.new("L", (64, 64)), area)
    return Image.composite(ground, image, both)


def halves(mask, k):
    "A straight cut through the middle of the subject: behind, in front, below, or across."
    x0, y0, x1, y1 = mask.getbbox()
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return [
        [(0, 0), (x, 0), (x, 64), (0, 64)],
        [(x + 3, 0), (64, 0), (64, 64), (x - 3, 64)],
        [(0, y + 3), (64, y - 3), (64, 64), (0, 64)],
        [(0, 0), (x - 8, 0), (x + 10, 64), (0, 64)],
    ][k % 4]


def broken(kind, k, image, ground, mask, other, other_mask):
    "One picture broken; the animals look to the right, so the head is at the right."
    x0, y0, x1, y1 = mask.getbbox()
    wide, high = x1 - x0, y1 - y0
    if kind == "blurred":
        soft = image.filter(ImageFilter.GaussianBlur(3.2 + 0.3 * (k % 5)))
        return Image.composite(soft, image, mask.filter(ImageFilter.MaxFilter(9)))
    if kind == "faded":
        return Image.blend(ground, image, 0.18 + 0.04 * (k % 5))
    if kind == "headless":
        left = x1 - 0.36 * wide
        return without(
            image, ground, mask, shape([(left, 0), (64, 0), (64, y0 + 0.62 * high), (left, y0 + 0.62 * high)])
        )
    if kind == "cut":
        return without(image, ground, mask, shape(halves(mask, k)))
    if kind == "doubled":
        out, second, area = image.copy(), image.transpose(Image.FLIP_LEFT_RIGHT), mask.transpose(Image.FLIP_LEFT_RIGHT)
        if k % 2:  # twice half there, some steps aside
            second, area, step = image, mask.point(lambda v: v // 2), 7 + k % 4
            out.paste(second, (-step, -4), mask=area)
            return out
        out.paste(second, (0, 0), mask=area)
        return out
    area = other_mask if k % 2 else Image.composite(other_mask, Image.new("L", (64, 64)), shape(halves(mask, 1)))
    out, shift = image.copy(), -6 if k % 2 else 4
    out.paste(other, (shift, shift // 2), mask=area)
    return out


def all_broken(images, masks, grounds, labels):
    "Ten of each kind: (60, 3, 64, 64) and their labels, of pictures by turns."
    out, marks = [], []
    for n, kind in enumerate(KINDS):
        for k in range(10):
            i = (10 * n + k) * 7 % len(images)
            j = (i + 19) % len(images)
            out.append(to_tensor(broken(kind, k, images[i], grounds[i], masks[i], images[j], masks[j])))
            marks.append(labels[i] | dict(made="broken", whole=False, kind=kind))
    return torch.stack(out), marks


def bases(drawn, labels):
    "What is broken: sixteen of the drawings, with SAM's masks, and twenty renders, with their own."
    sam, pairs, found = load_sam("mini"), [], []
    for i in [i for i in range(60) if labels[i]["whole"] and labels[i]["place"] != "city"][::3]:
        mask = to_pil_image(propose_subject(sam, drawn[i]).mask)
        pairs.append((to_pil_image(drawn[i]), mask, filled(to_pil_image(drawn[i]), mask)))
        found.append(labels[i])
    scenes = sample_scenes(20, stream("labels", 11))
    for k, (image, mask, ground) in enumerate(zip(*render(scenes, 64), strict=False)):
        pairs.append(tuple(map(to_pil_image, (image, (mask > 0.5).float(), ground))))
        asked = {name: world.VALUES[name][int(getattr(scenes, name)[k])] for name in ("species", "pose", "place")}
        found.append(dict(present=True) | asked)
    images, masks, grounds = zip(*pairs, strict=False)
    return images, masks, grounds, found


if __name__ == "__main__":
    models, labels = load_models(sys.argv[1], "cpu"), seen_labels()
    drawn = generated(models)
    pictures, marks = all_broken(*bases(drawn, labels))
    mini._save_labels(
        OUT,
        torch.cat([drawn, pictures]),
        labels + marks,
        by="tests/labelled.py",
        weights=models.hash,
        labelled_by="the author of page 12, a language model looking at the pictures",
    )
