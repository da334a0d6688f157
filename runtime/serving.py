"""Serving a locked checkpoint over the OpenAI API: all is checked here, then an engine takes this process's place.

The engines are vLLM, through our plugin (`vllm/`), and transformers' own server. Replacing the process leaves signals,
exit status and the health endpoint to the engine, and nothing of ours to clean up. What is wrong with a checkpoint or a
port is said here in a line: vLLM says it after most of a minute, in 200 lines that end "Engine core initialization
failed".
"""

import os
import re
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils.import_utils import is_accelerate_available, is_serve_available

from ..common.environment import OURS
from ..common.errors import DLRError, first_line
from ..common.files import MANIFEST, check_readable, permission_is_an_error
from ..common.hub import model_folder
from ..common.options import known_name
from .checkpoint import read_config, verify
from .config import DLRConfig
from .device import best_device
from .experts import chain_shapes

ENGINES = ("vllm", "transformers")
PLUGINS = "vllm.general_plugins"  # the entry point group, in which ours is called
PLUGIN = "dlr"
_PORT = 8000  # of both engines, where no --port is given
# On a CPU its cache is 0.9 of all memory by default: 18 of 24 GB, at which a tiny model's server was killed.
_CPU_SHARE = ["--cb-max-memory-percent", "0.1"]
_TRANSFORMERS = "import dlr_lock; from transformers.cli.transformers import app; app()"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to start.

    Attributes:
        engine: One of ENGINES.
        version: The engine's.
        command: Program and arguments.
        environment: All of it.
    """

    engine: str
    version: str
    command: list[str]
    environment: dict[str, str]

    def become(self) -> None:
        """Replaces this process by the server; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.command[0], self.command, self.environment)


@permission_is_an_error()
def prepare_server(
    path: str | Path, *, engine: str | None = None, hashes: bool = True, flags: list[str] | None = None
) -> Server:
    """Checks all that can be checked before an engine starts.

    Args:
        path: The checkpoint's directory, or its name on the Hugging Face hub.
        engine: One of ENGINES; None for vLLM where it is installed, else transformers.
        hashes: Whether every file is compared with the manifest, if there is one: a second or so a gigabyte.
        flags: The engine's own arguments, handed on as they are.

    Raises:
        DLRError: No such engine is installed, the port is taken, the flags name another model, or the checkpoint is
            damaged or incomplete.
    """
    flags = list(flags or [])
    if _value(flags, "--model") is not None:
        raise DLRError(
            "--model among the engine's flags would serve another model than the checkpoint: leave it out"
        )
    chosen = installed_engine(engine)
    _check_port(flags, "" if chosen == "vllm" else "localhost")
    folder = checked_folder(path, hashes=hashes)
    if chosen == "vllm":
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    else:
        bounded = any(flag.startswith(("--cb-num-blocks", "--cb-max-memory-percent")) for flag in flags)
        share = [] if bounded or best_device().type != "cpu" else _CPU_SHARE
        command = ["-c", _TRANSFORMERS, "serve", str(folder), "--continuous-batching", *share, *flags]
    return Server(chosen, _version(chosen), [sys.executable, *command], engine_environment(chosen))


@permission_is_an_error()
def checked_folder(path: str | Path, *, hashes: bool = True) -> Path:
    """The directory of a locked checkpoint (fetched from the hub, if that is what `path` names) that is whole.

    Raises:
        DLRError: It is no locked checkpoint, or it is damaged or incomplete. hashes: as for `prepare_server`.
    """
    folder = model_folder(path)
    lock = read_config(folder)
    check_readable(folder, "config.json", "*.safetensors", "*.index.json")
    check_tensors(folder, lock)
    if hashes and (folder / MANIFEST).is_file() and (faults := verify(folder)):
        raise DLRError(f"{folder} is not what was written: {'; '.join(faults)}")
    return folder


def engine_environment(engine: str) -> dict[str, str]:
    """All of an engine's environment: this process's, without what this program has set for itself."""
    environment = {name: value for name, value in os.environ.items() if OURS.get(name) != value}
    if engine == "vllm":
        # An egg-info in the working directory would hide the installed entry point.
        environment["PYTHONSAFEPATH"] = "1"
        allowed = environment.get("VLLM_PLUGINS")
        if allowed is not None and PLUGIN not in allowed.split(","):
            environment["VLLM_PLUGINS"] = ",".join(filter(None, [allowed, PLUGIN]))
    return environment


def check_tensors(folder: Path, lock: DLRConfig) -> None:
    """Looks into the headers of a checkpoint's weights for every tensor of its chains.

    Raises:
        DLRError: A file cannot be read, or a tensor is missing or has another shape than config.json says.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DLRError(
                f"{file} cannot be read: {first_line(error)}; fetch the checkpoint again"
            ) from error
    wanted_names = {
        f"{module}.{name}" for module, spec in lock.modules.items() for name in chain_shapes(spec)
    }
    renamed = _by_place(shapes.keys() - wanted_names)
    for module, spec in lock.modules.items():
        for name, wanted in chain_shapes(spec).items():
            found = shapes.get(f"{module}.{name}")
            if found is None:  # of some classes transformers saves modules under other names than they have
                others = [shapes[other] for other in renamed.get(_place(f"{module}.{name}"), [])]
                found = next((shape for shape in others if list(shape) == wanted), next(iter(others), None))
            if found is None:
                raise DLRError(f"{folder} has no {module}.{name}: it is incomplete, fetch it again")
            if list(found) != wanted:
                raise DLRError(f"{folder}: {module}.{name} is {list(found)}, config.json says {wanted}")


def _place(name: str) -> tuple[tuple[str, ...], str]:
    """A tensor's layer, and every other number in its name, and its last part: what renaming leaves."""
    return tuple(re.findall(r"\d+", name)), name.rpartition(".")[2]


def _by_place(names: Iterable[str]) -> dict[tuple[tuple[str, ...], str], list[str]]:
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for name in sorted(names):
        found.setdefault(_place(name), []).append(name)
    return found


def installed_engine(name: str | None) -> str:
    """The one of ENGINES of that name, or the first that is installed for None. Raises DLRError where it is not."""
    if name is not None:
        name = known_name(name, ENGINES, "engine")
    vllm = find_spec("vllm") is not None
    if name == "vllm" or (name is None and vllm):
        if not vllm:
            raise DLRError("vLLM is not installed: pip install vllm, or take --engine transformers")
        if not any(point.name == PLUGIN for point in entry_points(group=PLUGINS)):
            raise DLRError(
                "vLLM would not find dlr-lock's plugin: install dlr-lock itself, with pip, beside it"
            )
        return "vllm"
    if not is_serve_available():
        raise DLRError(
            "no engine is installed: pip install vllm, or 'transformers[serving]' for transformers' own"
        )
    if not is_accelerate_available():
        raise DLRError("transformers' server wants accelerate: pip install accelerate")
    return "transformers"


def _version(engine: str) -> str:
    if engine == "transformers":
        return version(engine)
    from vllm.version import __version__  # a CPU build's package has another name

    return __version__


def _check_port(flags: list[str], host: str) -> None:
    """Raises DLRError where an engine with these flags could not listen."""
    if _value(flags, "--uds") is not None:
        return
    host, written = _value(flags, "--host") or host, _value(flags, "--port")
    written = str(_PORT) if written is None else written
    if not written.isdecimal() or not 0 < int(written) < 2**16:
        raise DLRError(f"--port must be a number from 1 to 65535, not {written!r}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, int(written), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise DLRError(
            f"cannot listen on {host or 'any address'}, port {written}: {error.strerror}; "
            "give another port after --, as -- --port 8001"
        ) from error


def _value(flags: list[str], name: str) -> str | None:
    """What the last `name value` or `name=value` says."""
    found = None
    for at, flag in enumerate(flags):
        if flag == name:
            found = flags[at + 1] if at + 1 < len(flags) else ""
        elif flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
    return found
