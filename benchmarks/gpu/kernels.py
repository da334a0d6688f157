"""Stage `kernels`: one MLP slot at a time, every shape, chain and token count of benchmarks.kernels."""

from collections.abc import Sequence
from typing import Any

from dlr_lock.runtime.bench import COLD_BYTES, ROUNDS, chain_cases, numbers, run, sizes
from dlr_lock.runtime.slot import CPU_PROVIDERS, PROVIDERS, Case

from ..kernels import CHAINS, SHAPES, SMOKE, TOKENS
from .stage import Record

# The order of worth: what a short visit leaves out stands last.
_CHAINS = ("1x64", "8x64")
_TOKENS = (1, 512, 16, 4096)


def measure(record: Record) -> None:
    """Rows as `dlr-lock bench` has them. Of compiled forms only the MLP's: to compile a chain takes a minute."""
    earlier = record.rows
    cases = [case for case in ordered(smoke=record.smoke) if not _has(earlier, case)]
    groups = [(cases, list(CPU_PROVIDERS))]
    if record.device.type == "cuda":
        graphs = [name for name in PROVIDERS if not name.endswith("-compiled")]
        # The MLP is the same beside every chain of a shape: it is compiled once.
        first = [c for c in cases if (c.spec.lanes, c.spec.depth) == (1, _depth(c))]
        rest = [c for c in cases if c not in first]
        groups = [(first, [*graphs, "dense-compiled"]), (rest, graphs)]
    for group, providers in groups:
        earlier = record.rows
        if not group:
            continue
        if record.left() <= 0:
            record.stop("the limit of time")
            return

        def keep(document: dict[str, Any], earlier: list[dict[str, Any]] = earlier) -> None:
            for name in ("measured_rates", "constants", "settings"):
                record.document[name] = document[name]
            record.document["rows"] = earlier + document["rows"]
            record.save()

        document = run(
            group,
            device=record.device,
            providers=providers,
            rounds=2 if record.smoke else ROUNDS,
            cold_bytes=0 if record.smoke else COLD_BYTES,
            minutes=record.left() / 60,
            save=keep,
            progress=lambda what, done, total: print(f"kernels: {done} of {total} cases", flush=True),
        )
        if document["stopped"]:
            record.stop(document["stopped"])
            return


def ordered(*, smoke: bool) -> list[Case]:
    """All cases, those of most worth first."""
    shapes, chains, tokens = (
        (SMOKE["shapes"], SMOKE["chains"], SMOKE["tokens"]) if smoke else (SHAPES, CHAINS, TOKENS)
    )

    def worth(of: Sequence[Any], value: Any) -> int:
        return list(of).index(value) if value in of else len(of)

    listed = [
        ((worth(_CHAINS, chain), worth(_TOKENS, case.tokens)), case)
        for shape in shapes.split(",")
        for chain in chains.split(",")
        for case in _cases(shape, chain, numbers(tokens))
    ]
    return [case for _, case in sorted(listed, key=lambda pair: pair[0])]


def _cases(shape: str, chain: str, tokens: list[int]) -> list[Case]:
    hidden, intermediate = sizes(shape, 2)
    lanes, depth, *rank = sizes(chain, 2, 3)
    return chain_cases(hidden, intermediate, lanes=lanes, depth=depth, rank=(*rank, None)[0], tokens=tokens)


def _depth(case: Case) -> int:
    """Of the chain that the first one of the list becomes at this MLP."""
    _, depth = sizes(_CHAINS[0], 2)
    (same,) = chain_cases(case.spec.hidden_size, case.intermediate, depth=depth, tokens=[1])
    return same.spec.depth


def _has(rows: list[dict[str, Any]], case: Case) -> bool:
    lanes, depth, rank, hidden = case.spec.weight_shape
    wanted = {"hidden": hidden, "intermediate": case.intermediate, "tokens": case.tokens}
    wanted |= {"lanes": lanes, "depth": depth, "rank": rank}
    return any(all(row[name] == value for name, value in wanted.items()) for row in rows)
