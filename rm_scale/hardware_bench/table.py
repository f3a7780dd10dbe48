"""The measurements of a machine as a table."""

from __future__ import annotations

from rm_scale.hardware_bench.measured import MIB, Layers, Measured, Product, Transfer
from rm_scale.planning.hardware import GIB


def as_table(name: str, measured: Measured) -> str:
    """Return a table of the measurements, for people."""
    each = f"{measured.num_threads} threads each" if measured.device == "cpu" else "one GPU each"
    lines = [f"{name}: {measured.device_name}; ranks at once: {measured.num_ranks}, {each}; figures are per rank", ""]
    lines += [f"matrix products, {measured.dtype}"]
    lines += [_product_line(product, measured) for product in measured.products]
    lines += ["", "decoder layers, forward and backward"]
    lines += [_layers_line(layers) for layers in measured.layers]
    lines += ["", "memory"]
    lines += [f"  {kind:<20} {rate / 1e9:10.1f} GB/s" for kind, rate in measured.memory_bandwidth.items()]
    lines += [f"  {'available':<20} {measured.memory_bytes / GIB:10.1f} GiB"]
    if measured.transfers:
        lines += ["", f"collectives over {measured.num_ranks} ranks, {measured.backend}"]
        lines += [_transfer_line(transfer) for transfer in measured.transfers]
        lines += [
            f"  {collective:<16} fits {link.latency_seconds * 1e6:8.0f} us + bytes / {link.bandwidth / 1e9:.2f} GB/s"
            for collective, link in measured.links().items()
        ]
    else:
        lines += ["", "collectives: one rank has nobody to talk to; --nproc 2 measures them"]
    return "\n".join(lines)


def _product_line(product: Product, measured: Measured) -> str:
    shape = f"{product.tokens} x {product.inputs} x {product.outputs}"
    notes = [
        note for note, other in (("largest rate", measured.best), ("typical", measured.typical)) if product == other
    ]
    note = f"  <- {', '.join(notes)}" if notes else ""
    return f"  {product.what:<20} {shape:>20} {product.flops / 1e12:9.3f} TFLOP/s{note}"


def _layers_line(layers: Layers) -> str:
    shape = f"{layers.num_layers} x {layers.hidden_size}, {layers.rows * layers.tokens} tokens"
    return f"  {shape:<20} {layers.seconds * 1e3:18.1f} ms"


def _transfer_line(transfer: Transfer) -> str:
    rate = transfer.link_bytes / transfer.seconds / 1e9
    size = f"{transfer.num_bytes / MIB:.0f} MiB"
    return f"  {transfer.collective:<16} {size:>8} {transfer.seconds * 1e3:10.2f} ms {rate:9.2f} GB/s a link"
