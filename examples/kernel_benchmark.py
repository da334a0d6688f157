"""Times the chain of a locked checkpoint against a gated MLP of as many parameters, and writes what it measured.

python examples/kernel_benchmark.py out times.json --tokens 1,16,512

The figures are of the chain's shape on random data, as in `dlr-lock bench`; a form whose error against float64 is over
its limit gets no time. On a CPU the forms are plain torch; the Triton kernels run on a CUDA or ROCm device alone.
"""

import argparse
import json
from pathlib import Path

from dlr_lock.microbench.bench import numbers, run
from dlr_lock.microbench.slot import Case
from dlr_lock.runtime import best_device, inspect
from dlr_lock.runtime.spec import DLRSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="directory of a locked checkpoint")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", default="1,16,512", help="token counts")
    parser.add_argument(
        "--rounds", type=int, default=20, help="times each form is timed, in turns with the others"
    )
    parser.add_argument(
        "--cold-bytes", type=float, help="of distinct weights that calls rotate over; by default four caches"
    )
    options = parser.parse_args()

    modules = inspect(options.checkpoint)["lock"]["modules"]
    spec = DLRSpec.from_dict(next(iter(modules.values())))
    intermediate = round(spec.params / (3 * spec.hidden_size))
    cases = [Case(spec, intermediate, tokens) for tokens in numbers(options.tokens)]
    document = run(cases, device=best_device(), rounds=options.rounds, cold_bytes=options.cold_bytes)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    print(f"{next(iter(modules))}: {spec} against an MLP of width {intermediate}, {document['device']}")
    for row in document["rows"]:
        time = (
            f"{row['median_us']:,.0f} us"
            if row["median_us"]
            else f"no time: {row['error_message'] or row['error']}"
        )
        print(f"{row['tokens']:5} tokens  {row['provider']:18} {time}")


if __name__ == "__main__":
    main()
