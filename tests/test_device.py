"""Training on an accelerator, checked without one: on the `meta` device every tensor has a place, and no number
can be read back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
MAY_MIX = ("copy_", "_to_copy")


class OneDevice(TorchDispatchMode):
    "Refuses what waits for the device, and what mixes tensors of two devices; counts what runs there."

    def __init__(self, device, by_mask=False):
        super().__init__()
        self.device, self.by_mask, self.ran = device, by_mask, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if x.device.type == self.device]
        assert not (there and name.startswith(WAITS)), f"{name} waits for the device"
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in there[1:])
        assert self.by_mask or not by_mask, f"{name} by a mask waits for the device"
        apart = [x for x in tensors if x.device.type != self.device and x.ndim]
        assert name in MAY_MIX or not (there and apart), f"{name} mixes devices"
        self.ran += bool(there)
        return func(*args, **(kwargs or {}))


def made(stage, folder):
    from layerdiffusion.mini.training import _STAGES, _build_vae

    if not (folder / "vae").exists():
        _build_vae().save_pretrained(folder / "vae")
    kw = dict(vae=folder / "vae") if stage in ("decoder", "diffusion", "judge", "adapter") else {}
    return _STAGES[stage](level=0.5, **kw)


@pytest.mark.parametrize("stage", ["vae", "sam", "clip", "judge", "encoder", "adapter"])
def test_a_step_stays_on_the_device(stage, tmp_path):
    "Scenes from the CPU, pictures, latents, loss and update on the device; nothing is read back."
    from layerdiffusion.mini.training import _averaging, _draw_scenes

    objective = made(stage, tmp_path).to("meta")
    ema = _averaging(objective)
    ema.n_averaged += 1
    scenes, g = _draw_scenes(objective, 0)
    with OneDevice("meta", by_mask=stage == "sam") as mode:  # segment_anything's own prompt encoder picks by masks
        loss, logs = objective(scenes, g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        ema.update_parameters(objective)
    assert mode.ran > 100 and loss.device.type == "meta" and ema.n_averaged == 2
    assert all(v.device.type == "meta" for v in logs.values())


def test_the_watch_sees_what_waits():
    "Each of these would be found."
    x = torch.ones(3, device="meta")
    for ask in (lambda: x.sum().item(), lambda: bool((x > 0).any()), lambda: x[x > 0], lambda: x + torch.ones(3)):
        with pytest.raises((AssertionError, RuntimeError)), OneDevice("meta"):
            ask()


def test_batches_are_larger_on_an_accelerator(tmp_path):
    """Many individuals, four views of each, and each is drawn in sight of another view of itself, never of another
    individual; a tenth of them sees nothing."""
    from layerdiffusion.mini.training import _draw_scenes, enlarged

    objective = enlarged(made("adapter", tmp_path), "cuda")
    assert objective.batch == 64 and enlarged(made("adapter", tmp_path), "cpu").batch == 4
    scenes, g = _draw_scenes(objective, 0)
    objective.fill(scenes)
    group = objective.pool[-1]["scenes"]
    looks = group.look.view(16, 4, -1)
    assert (looks == looks[:, :1]).all() and len(looks[:, 0].unique(dim=0)) == 16 and group.present.all()
    coats = group.colour.view(16, 4)
    assert (coats[:, :3] == coats[:, :1]).all() and 0 < (coats[:, 3] != coats[:, 0]).sum() < 16
    given = []
    objective.loss = lambda drawn, g, seen: given.append((torch.cat([d["seen"] for d in drawn]), seen))
    objective.forward(scenes, g)
    own, seen = (x.view(-1, 4, 128) for x in given[0])
    nothing = (seen == 0).all(-1)
    assert own.any(-1).all() and 0.04 < nothing.float().mean() < 0.17
    turns = [torch.equal(seen[~nothing], own.roll(k, 1)[~nothing]) for k in range(4)]
    assert turns.count(True) == 1 and not turns[0]


def test_places_alone_are_trained(tmp_path):
    """Some pictures of the base show a place without anybody, under the place's words alone: without them, "in the
    snow" came to draw an animal."""
    from layerdiffusion.mini import world
    from layerdiffusion.mini.training import _draw_scenes

    objective = made("diffusion", tmp_path)
    objective.batch = 100
    scenes, g = _draw_scenes(objective, 0)
    alone = scenes[~scenes.present]
    assert 1 < len(alone) < 15 and objective.empty >= 0.05
    mask = objective.fill(alone)[1]
    said = world.captions(objective.pool[-1]["scenes"], g)
    assert mask.max() == 0 and not [s for s in said if {*s.split()} & {*world._SPECIES, *world._POSES}]


def test_places_are_the_same_on_both_paths(monkeypatch):
    "Drawn for all and chosen, or each group by itself."
    from layerdiffusion.mini import world

    scenes = world.sample_scenes(12, world.stream("places"), 1.0)
    one = world.draw_places(scenes, 32)
    layout = scenes.layout.as_subclass(type("Elsewhere", (torch.Tensor,), dict(is_cpu=False)))
    other = world.draw_places(world.replace(scenes, layout=layout), 32)
    assert torch.allclose(one, other.as_subclass(torch.Tensor), atol=1e-6)
