"""Markdown of results about kernels, codecs and codes: bytes that move, registers, errors."""

from figures.tables import NAMES, Row, markdown


def render_traffic(results: Row) -> str:
    """Markdown tables of the bytes that CUDA code moves: activations; forward, backward and launches of norms."""
    activations = [row for row in results["rows"] if "place" not in row]
    norms = [row for row in results["rows"] if "place" in row]
    mlp = results["mlp"]
    forwards = [row for row in activations if row["half"] == "forward" and not row["variant"].startswith("kernel")]
    loads = sorted({sum(row["x_loads"]) for row in forwards})
    columns = "stock / fused / kernel"
    return (
        f"Inductor's code for an {results['device']}, {results['dtype']}, torch {results['torch']}, triton "
        f"{results['triton']}; generated, not run. Bytes of a whole half of the training graph, matrix products and "
        f"partial sums included, in units of the operator's input.\n\n"
        f"Linear({mlp['width']}, {mlp['hidden']}), activation, frozen Linear({mlp['hidden']}, {mlp['width']}), "
        f"{mlp['tokens']} tokens: units in forward + backward, and launches beside matrix products and seeds. The "
        f"kernels that Inductor writes for forward load x {' or '.join(map(str, loads))} time(s) in all.\n\n"
        f"{_activations(activations)}\n\n"
        f"Norms, backward, {columns}:\n\n{_norms(norms, 'backward', 'units')}\n\n"
        f"Norms, forward, {columns}; frozen ones move the same:\n\n"
        f"{_norms([row for row in norms if not row['frozen']], 'forward', 'units')}\n\n"
        f"Norms, launches in backward, {columns}:\n\n{_norms(norms, 'backward', 'kernels')}"
    )


def _activations(rows: list[Row]) -> str:
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        name = row["operator"] + (f", dropout {row['dropout']}" if row["dropout"] else "")
        cells.setdefault(name, {}).setdefault(row["variant"], []).append(row)
    variants = dict.fromkeys(row["variant"] for row in rows)
    lines = []
    for name, found in cells.items():
        pairs = ((forward, backward) for forward, backward in (found[variant] for variant in variants))
        lines.append(
            [name, *(f"{f['units']:.2f} + {b['units']:.2f} ({f['kernels']} + {b['kernels']})" for f, b in pairs)]
        )
    return markdown(["activation", *variants], lines)


def _norms(rows: list[Row], half: str, what: str) -> str:
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["half"] == half:
            name = f"{row['operator']}, {'frozen' if row['frozen'] else 'trained'}, {row['place']}"
            figure = f"{row[what]:.2f}" if what == "units" else str(row[what])
            cells.setdefault(name, {}).setdefault(f"{row['rows']} × {row['width']}", []).append(figure)
    sizes = dict.fromkeys(size for found in cells.values() for size in found)
    lines = [[name, *(" / ".join(found[size]) for size in sizes)] for name, found in cells.items()]
    return markdown(["norm", *sizes], lines)


def render_block_traffic(results: Row) -> str:
    """One table: saved units, and traffic and launches of both halves, for each block and method."""
    rows = {(row["block"], row["method"]): row for row in results["rows"]}
    methods = dict.fromkeys(method for _, method in rows)
    lines = []
    for block in dict.fromkeys(block for block, _ in rows):
        found = [rows[block, method] for method in methods]
        lines.append([NAMES[block], "saved", *(f"{row['saved'] / results['unit_bytes']:.1f}" for row in found)])
        for half in ("forward", "backward"):
            halves = (row[half] for row in found)
            cells = (
                f"{each['bytes'] / results['unit_bytes']:.1f} ({each['kernels']} + {each['products']})"
                for each in halves
            )
            lines.append(["", half, *cells])
    return (
        f"Inductor's code for an {results['device']}, {results['dtype']}, {results['tokens']} tokens, width "
        f"{results['width']}, torch {results['torch']}, triton {results['triton']}; generated, not run. Bytes saved, "
        "and bytes moved, in units of one hidden state (Triton kernels + matrix products launched):\n\n"
        + markdown(["block", "", *(f"`{method}`" for method in methods)], lines)
    )


def render_codecs(results: Row) -> str:
    """One table: a row for each codec."""
    head = ["codec", "bits", *results["rows"][0]["error"], "CPU encode + decode", "CUDA forward", "CUDA backward"]
    lines = []
    for row in results["rows"]:
        cuda = (f"{half['units']:+.2f} ({half['kernels'] - half['kernels_without']})" for half in row["cuda"].values())
        cpu = f"{row['cpu']['encode']} + {row['cpu']['decode']}"
        lines.append([f"`{row['codec']}`", str(row["bits"]), *map(str, row["error"].values()), cpu, *cuda])
    return (
        f"torch {results['torch']}. Errors: |x_ - x| / |x|; others: the channels beside those of outliers. CPU: time "
        f"of each kernel over that of gelu, bfloat16, one thread; a copy takes {results['cpu_copy']}. CUDA: units of x "
        "moved beyond what the same without a codec moves (launches added), by the code that Inductor writes.\n\n"
        + markdown(head, lines)
    )


def render_codes(results: Row) -> str:
    """One table: a row for each activation and depth, the schemes side by side."""
    rows = {(row["activation"], row["blocks"], row["scheme"]): row for row in results["rows"]}
    schemes = list(dict.fromkeys(scheme for _, _, scheme in rows))
    lines = []
    for activation, blocks in dict.fromkeys((activation, blocks) for activation, blocks, _ in rows):
        found = (rows[activation, blocks, scheme] for scheme in schemes)
        cells = (f"{row['error']:.3f} / {row['error_of_mean']:.3f} / {row['cosine']:.4f}" for row in found)
        lines.append([f"{activation}, {blocks} {'block' if blocks == 1 else 'blocks'}", *cells])
    return (
        f"ViT blocks with LoRA on qkv, all else frozen, {results['dtype']}, {results['tokens']} tokens, width "
        f"{results['width']}, torch {results['torch']}: relative error of the gradient in one step / of the mean over "
        f"{results['draws']} draws / cosine with the exact gradient of one step.\n\n"
        + markdown(["network", *(f"`{scheme}`" for scheme in schemes)], lines)
    )


def render_cubins(results: Row) -> str:
    """One table: registers of each kernel over its dtypes, sizes and activations, and what they spill."""
    kernels: dict[str, dict[str, list[Row]]] = {}
    for row in results["rows"]:
        kernels.setdefault(row["kernel"], {}).setdefault(row["arch"], []).append(row)
    archs = sorted({row["arch"] for row in results["rows"]})
    head, lines = ["kernel", *(f"registers, {arch}" for arch in archs), "builds", "bytes spilled"], []
    for kernel, by_arch in kernels.items():
        registers = [[row["registers"] for row in by_arch[arch]] for arch in archs]
        rows = [row for arch in archs for row in by_arch[arch]]
        spilled = sum(row["spill_stores"] + row["spill_loads"] for row in rows)
        ranges = [f"{min(each)} to {max(each)}" for each in registers]
        lines.append([f"`{kernel}`", *ranges, str(len(rows)), str(spilled)])
    return f"Triton {results['triton']}.\n\n{markdown(head, lines)}"
