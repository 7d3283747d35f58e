"""Reports as text: a few lines each, or rows of a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffax.tools.compile_ahead.roofline import CHIPS, FEW, GIB, communication


def what(found: Mapping[str, Any]) -> str:
    """What a report is of: program, section and devices."""
    program = {"train": "train step", "sample": "sampler"}[found["program"]]
    return f"the {program} of {found['config']}.{found['section']} for {found['count']} x {found['kind']}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def describe(found: Mapping[str, Any]) -> str:
    """A report as lines of text."""
    each = f"{found['batch_size']} samples" if found["program"] == "sample" else f"batch {found['batch_size']}"
    more = f" in {found['accumulate']} microbatches" if found.get("accumulate", 1) > 1 else ""
    more += f", {found['dtype']}, remat {found['remat']}" + ", flash attention" * found["flash"]
    lines = [f"{what(found)}, {found['parallel']}, {each}{more}"]
    limit = f" of {_size(found['limit'])}" if found.get("limit") else ""
    if found["fits"] is False:
        lines.append(f"  does not fit: {_size(found['total'])}{limit} on each device")
        if found["remedies"]:
            lines.append("  by estimate it would fit with one of these:")
            lines += [f"    {flags}" for flags in found["remedies"]]
        else:
            lines.append("  neither a smaller batch nor remat nor fsdp would make it fit; take more or larger devices")
        return "\n".join(lines)
    lines.append(
        f"  memory of each device: {_size(found['total'])}{limit}: arguments {_size(found['arguments'])}, outputs "
        f"{_size(found['outputs'])} ({_size(found['aliased'])} of them in place), temporary "
        f"{_size(found['temporary'])}, code {_size(found['code'])}"
    )
    turns = f", all {found['loops']:,} turns of its loop, of which XLA counts one" if found["loops"] > 1 else ""
    work = f"{found['flops'] / 1e9:,.1f} GFLOP and {found['accessed'] / 1e9:,.2f} GB accessed"
    lines.append(f"  work of each device: {work}{turns}")
    if "seconds" not in found:
        lines.append(f"  no figures of the peak of {found['kind']} are known here, so no time is given")
        return "\n".join(lines)
    share = found["flops"] / (found["seconds"] * CHIPS[found["kind"]].flops)
    lines.append(
        f"  roofline, from the vendor's figures, communication between devices left out: "
        f"{1000 * found['seconds']:,.1f} ms, bound by {found['bound']}, "
        f"{100 * share:.0f} % of the peak; {found['images_per_second']:,.1f} images/s"
    )
    if seconds := _communication_seconds(found):
        lines.append(
            f"  communication between devices, at least, by the vendor's figure: {1000 * seconds:,.1f} ms, more or "
            "less of it while they compute"
        )
    if found.get("few"):
        lines.append(
            f"  of fewer than {FEW} pictures, here {found['few']} in a device's microbatch, a TPU moves some 5 times "
            "the bytes of each: take fewer microbatches or devices; remat and fsdp leave more room for pictures"
        )
    if "days" in found:
        lines.append(f"  {found['steps']:,} steps at that pace: {found['days']:,.1f} days")
    return "\n".join(lines)


def _communication_seconds(found: Mapping[str, Any]) -> float:
    """The least time of a train step's communication; 0 of a sampler, of one device, and where links are not known."""
    chip = CHIPS.get(found["kind"])
    if not chip or not chip.links or "parameters" not in found:
        return 0.0
    options = {key: found[key] for key in ("dtype", "accumulate")}
    options |= {"mode": found["parallel"], "remat": found["remat"] != "none", "devices": found["count"]}
    return communication(found["parameters"], **options) / chip.links


COLUMNS = (
    *("config", "program", "devices", "how", "memory", "TFLOP", "GB", "roofline", "of peak", "communication"),
    *("images/s", "days"),
)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Reports as a Markdown table: memory and work per device."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in found:
        how = [row["parallel"], row["dtype"], *(key for key in ("remat", "flash") if row[key] not in ("none", False))]
        how += [f"batch {row['batch_size']}" + (f" / {row['accumulate']}" if row.get("accumulate", 1) > 1 else "")]
        limit = f" of {row['limit'] / GIB:.1f}" if row.get("limit") else ""
        work = [""] * 7
        if row["fits"] is not False:
            work[:2] = [f"{row['flops'] / 1e12:.2f}", f"{row['accessed'] / 1e9:.1f}"]
        if "seconds" in row:
            share = f"{row['flops'] / row['seconds'] / CHIPS[row['kind']].flops:.0%}"
            sent = _communication_seconds(row)
            work[2:] = [f"{1000 * row['seconds']:,.0f} ms, {row['bound']}", share]
            work += [f"{1000 * sent:,.0f} ms" if sent else "", f"{row['images_per_second']:,.0f}"]
            work += [f"{row['days']:,.1f}" if "days" in row else ""]
        memory = f"{row['total'] / GIB:.1f}{limit} GiB" + (" **does not fit**" if row["fits"] is False else "")
        devices = row["topology"] or f"{row['count']} x {row['kind']}"
        rows.append([f"{row['config']}.{row['section']}", row["program"], devices, ", ".join(how), memory, *work])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
