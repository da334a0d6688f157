"""Locks a model from Python and says what it cost in quality.

python examples/convert.py path-or-hub-id out --data text.txt --layers 12-15 --effort quick
"""

import argparse

import dlr_lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a transformers directory, a hub id or a .gguf file")
    parser.add_argument("out", help="directory of the locked checkpoint; it must not be there yet")
    parser.add_argument("--data", required=True, help="calibration text: .txt, .jsonl, .parquet")
    parser.add_argument("--layers", help="such as 12-15 or 2-5,9; all by default")
    parser.add_argument("--effort", default="quick", help="quick, standard or best")
    parser.add_argument("--tokens", type=int, help="tokens of calibration text, instead of the effort's")
    parser.add_argument("--train-tokens", type=int, help="training tokens a module, instead of the effort's")
    options = vars(parser.parse_args())

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            print(f"{what}: done")

    # Every other keyword is a field of dlr_lock.convert.ConversionConfig: what `dlr-lock convert --help` lists.
    report = dlr_lock.convert_model(options.pop("source"), options.pop("out"), progress=progress, **options)
    for module in report.modules:
        print(
            f"{module.module}: {module.spec}, relative error {module.fidelity.rel_error:.3f}, {module.verdict}"
        )
    print(f"held-out loss {report.evaluation.original_loss:.3f} became {report.evaluation.loss:.3f}")


if __name__ == "__main__":
    try:
        main()
    except dlr_lock.DLRError as error:  # everything that the user can correct, in one line
        raise SystemExit(f"convert.py: {error}") from None
