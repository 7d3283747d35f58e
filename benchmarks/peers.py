"""PyTorch programs beside which `python -m diffax.tools.benchmark --peer=...` measures diffax; started by it.

It runs under a python of its own, in which torch is installed, and reads nothing of diffax. On stdin it is asked, one
JSON object a line, to {"prepare": program}, to run what is prepared {"times": n}, or for the {"memory": true} that this
took of a GPU; each answer is a JSON object on stdout.

The programs do what diffax's do on the same network: forward is one call of it; train is loss, backward, AdamW and one
running average of the parameters, of noise prediction alone (diffax's own step also trains the variance); ddimN and
dpmN are N steps of sampling. Everything is eager and in torch's own memory format unless asked for otherwise.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

EMA = 0.9999


def serve(prepare: Callable[[str], tuple[Callable[[int], float], dict]], asked: Iterable[str], replies: TextIO) -> None:
    """Answers requests until there are no more.

    Args:
      prepare: name of a program -> (times -> seconds that so many runs took, facts to report).
      asked: the requests, JSON.
      replies: where answers go.
    """
    run = None
    for line in asked:
        request = json.loads(line)
        if "prepare" in request:
            run = None  # its memory is free before the next program takes some
            run, reply = prepare(request["prepare"])
        elif "memory" in request:
            reply = {"bytes": gpu_bytes()}
        else:
            reply = {"seconds": run(request["times"])}
        print(json.dumps(reply), file=replies, flush=True)


def gpu_bytes() -> int | None:
    """The most bytes that torch held on a GPU; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def own_stdout() -> TextIO:
    """What is stdout now; whatever else is printed from here on goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def diffusers_network(net: dict[str, Any]):
    """diffusers' UNet2DModel of these sizes, and the call z, time, label -> out."""
    import diffusers

    widths = [int(mult * net["channels"]) for mult in net["channel_mult"]]
    at = [2**level in net["attention"] for level in range(len(widths))]
    biggan = net["resample"] == "biggan"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if biggan else ("DownBlock2D", "UpBlock2D")
    model = diffusers.UNet2DModel(
        sample_size=net["shape"][0],
        in_channels=net["shape"][2],
        out_channels=net["out_channels"],
        block_out_channels=widths,
        layers_per_block=net["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if attends else plain[0] for attends in at],
        up_block_types=["AttnUpBlock2D" if attends else plain[1] for attends in reversed(at)],
        # it knows one width of a head for all levels, not a number of heads
        attention_head_dim=net["head_channels"] or max(w for w, a in zip(widths, at, strict=True) if a) // net["heads"],
        resnet_time_scale_shift="scale_shift" if net["scale_shift"] else "default",
        downsample_type="resnet" if biggan else "conv",
        upsample_type="resnet" if biggan else "conv",
        dropout=net["dropout"],
        norm_num_groups=net["groups"],
        num_class_embeds=net["num_classes"] or None,
    )
    return model, lambda z, time, label: model(z, time, class_labels=label, return_dict=False)[0]


def guided_diffusion_network(net: dict[str, Any]):
    """guided-diffusion's UNetModel of these sizes, and the call z, time, label -> out."""
    from guided_diffusion.unet import UNetModel

    model = UNetModel(
        image_size=net["shape"][0],
        in_channels=net["shape"][2],
        model_channels=net["channels"],
        out_channels=net["out_channels"],
        num_res_blocks=net["num_res_blocks"],
        attention_resolutions=tuple(net["attention"]),
        dropout=net["dropout"],
        channel_mult=tuple(net["channel_mult"]),
        num_classes=net["num_classes"] or None,
        num_heads=net["heads"],
        num_head_channels=net["head_channels"] or -1,
        use_scale_shift_norm=net["scale_shift"],
        resblock_updown=net["resample"] == "biggan",
    )
    return model, lambda z, time, label: model(z, time, label)


NETWORKS = {"diffusers": diffusers_network, "guided-diffusion": guided_diffusion_network}


def prepare(peer: str, net: dict[str, Any], program: str) -> tuple[Callable[[int], float], dict]:
    """Builds one of the programs, on a GPU if torch sees one; see `serve`."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, call = NETWORKS[peer](net)
    model.to(device, memory_format=torch.channels_last if net["channels_last"] else torch.contiguous_format)
    batch, height, channels = net["batch_size"], net["shape"][0], net["shape"][2]
    x = torch.randn(batch, channels, height, net["shape"][1], device=device)
    label = torch.zeros(batch, dtype=torch.long, device=device) if net["num_classes"] else None
    level = torch.cos(torch.linspace(0, 1, 1001, dtype=torch.float64)[1:] * torch.pi / 2) ** 2
    signal = level.clamp(1e-5).float().to(device)

    def network(z, t):
        with torch.autocast(device, torch.bfloat16, enabled=net["dtype"] == "bfloat16"):
            return call(z, t, label).float()

    if program == "train":
        once = trainer(model, network, x, signal)
    elif program == "forward":
        model.eval()
        ones = torch.ones(batch, device=device)
        once = torch.no_grad()(lambda: network(x, ones))
    elif sample := sampler(peer, program, signal):
        model.eval()
        once = torch.no_grad()(lambda: sample(network, x))
    else:
        return float, {"missing": True}

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            once()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": {name: sys.modules[name].__version__ for name in ("torch", "diffusers") if name in sys.modules},
    }
    return run, facts


def trainer(model, network, x, signal):
    """One training step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]

    def once():
        t = torch.randint(len(signal), (len(x),), device=x.device)
        a = signal[t].view(-1, 1, 1, 1)
        eps = torch.randn_like(x)
        out = network(a.sqrt() * x + (1 - a).sqrt() * eps, t.float())
        loss = torch.nn.functional.mse_loss(out[:, : x.shape[1]], eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        torch._foreach_mul_(averages, EMA)
        torch._foreach_add_(averages, [p.detach() for p in parameters], alpha=1 - EMA)
        return loss.item()

    return once


def sampler(peer: str, program: str, signal):
    """(network, noise) -> pictures, by diffusers' schedulers or, for DDIM, a plain loop; None where there is none."""
    import torch

    steps = int("".join(filter(str.isdigit, program)))
    if peer == "diffusers":
        import diffusers

        kinds = {"ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}
        scheduler = kinds[program.rstrip("0123456789")](beta_schedule="squaredcos_cap_v2")

        def by_scheduler(network, z):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                out = network(z, t.expand(len(z)).to(z.device, torch.float32))
                z = scheduler.step(out[:, : z.shape[1]], t, z).prev_sample
            return z

        return by_scheduler
    if not program.startswith("ddim"):
        return None
    kept = torch.linspace(len(signal) - 1, 0, steps).round().long().tolist()

    def ddim(network, z):
        for t, s in zip(kept, [*kept[1:], None], strict=True):
            a, b = signal[t], signal[s] if s is not None else torch.ones_like(signal[0])
            eps = network(z, torch.full((len(z),), float(t), device=z.device))[:, : z.shape[1]]
            x = ((z - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            eps = (z - a.sqrt() * x) / (1 - a).sqrt()
            z = b.sqrt() * x + (1 - b).sqrt() * eps
        return z

    return ddim


def main() -> None:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=sorted(NETWORKS), required=True)
    parser.add_argument("--path", help="a checkout that holds the package of the peer")
    parser.add_argument("--network", type=json.loads, required=True, help="sizes, as JSON")
    args = parser.parse_args()
    if args.path:
        sys.path.insert(0, args.path)
    serve(lambda program: prepare(args.peer, args.network, program), sys.stdin, own_stdout())


if __name__ == "__main__":
    main()
