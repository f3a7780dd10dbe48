"""Which device each rank works on, and NVIDIA GPUs of this machine that torch would leave unused.

An environment made on a login node gets torch's CPU build and keeps it on the GPU node, where everything would then run
on the processor for hours without a message.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rm_scale.distributed import World, has_gpu, own_gpu
from rm_scale.errors import UserError
from rm_scale.launch.nvidia_smi import query_gpus
from rm_scale.logs import get_logger
from rm_scale.texts import one_line
from rm_scale.version import PACKAGE

logger = get_logger(__name__)

ROOT = Path("/")
ON_PURPOSE = 'CUDA_VISIBLE_DEVICES="" before the command'
_HIDDEN = frozenset({"", "-1", "none", "nodevfiles"})
"""Values of CUDA_VISIBLE_DEVICES that show no GPU; the last is Slurm's for a job that was given none."""

CUDA_OF_DRIVER = ((580, 13), (525, 12), (450, 11))
"""Driver, CUDA: from this driver on, all releases of this CUDA run (NVIDIA, "CUDA Compatibility")."""

TORCH_INDEX = {12: "https://download.pytorch.org/whl/cu126", 13: "https://download.pytorch.org/whl/cu130"}
"""An index with builds of torch for a CUDA; https://pytorch.org/get-started/locally lists those of each release."""


# --- A rank's device -------------------------------------------------------------------------------------------------


def device_number(local_rank: int, num_visible: int) -> int | None:
    """Return the GPU of a rank among those it sees; `None` where none is left for it.

    A rank that sees a single one was given its own, as by `srun --gpus-per-task 1`; else the ranks of a node share out
    what all of them see.

    Args:
        local_rank: of this rank, within its node.
        num_visible: GPUs that torch shows this rank.
    """
    if num_visible == 1:
        return 0
    return local_rank if local_rank < num_visible else None


def num_gpus() -> int:
    """Return how many GPUs torch shows this process."""
    import torch

    return torch.cuda.device_count() if has_gpu() else 0


def rank_device(asked: str | None, world: World) -> str:
    """Return where this rank's model goes, "cpu" or "cuda:N", which becomes torch's current device.

    Args:
        asked: by the user; `None`: the GPU when there is one, "cuda": this rank's GPU.
        world: this rank's place.

    Raises:
        UserError: no GPU is left for this rank, one was asked for that torch does not see, or it is no device's name.
    """
    import torch

    try:
        device = torch.device(asked or "cuda")
    except RuntimeError as error:
        raise UserError(f"device={asked}: is no device of torch. Fix: cpu, cuda or cuda:0.") from error
    if device.type != "cuda":
        return str(asked)
    if not has_gpu():
        if asked is not None:
            raise UserError(f"device={asked}: {_why_no_gpu()}")
        _warn_of_unused_gpus()
        return "cpu"
    number = own_gpu(world) if device.index is None else device.index
    if number >= num_gpus():
        raise UserError(f"device={asked}: torch sees {num_gpus()} GPUs, numbered from 0. Fix: --device cuda.")
    torch.cuda.set_device(number)  # kernels that are compiled or loaded go by the current device
    return f"cuda:{number}"


def training_device() -> str:
    """Return the kind of device that a run trains on, "cuda" or "cpu".

    Raises:
        UserError: GPUs that this process was given would stay unused.
    """
    if has_gpu():
        return "cuda"
    unused = unused_gpus()
    if unused is not None and unused.given:
        error = UserError(
            f"{unused.seen}: training would run on the processor. Fix: {unused.fix} To train on the processor on "
            f"purpose: {ON_PURPOSE}."
        )
        error.met_by = "node"  # all ranks of a machine see the same
        raise error
    _warn_of_unused_gpus()
    return "cpu"


def _warn_of_unused_gpus() -> None:
    unused = unused_gpus()
    if unused is not None:
        logger.warning(
            f"{unused.seen}: the processor does the work. Fix: {unused.fix} To say that it is meant: {ON_PURPOSE}."
        )


def _why_no_gpu() -> str:
    unused = unused_gpus()
    if unused is None:
        return "torch sees no GPU here. Fix: leave --device out, or --device cpu."
    return f"{unused.seen}. Fix: {unused.fix}"


# --- GPUs that torch does not see ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineGpus:
    """NVIDIA GPUs of this machine, looked for without torch.

    Attributes:
        num_known: that the driver lists, whoever may use them.
        num_given: that this process may open: Slurm and containers keep others away.
        driver: its version, such as "535.129.03"; empty where it is not known.
    """

    num_known: int = 0
    num_given: int = 0
    driver: str = ""


@dataclass(frozen=True)
class UnusedGpus:
    """GPUs that torch does not see, though nobody has hidden them.

    Attributes:
        seen: what was found.
        fix: what to do so that they are used.
        given: this process may use them; else a job or container has to be started with them.
    """

    seen: str
    fix: str
    given: bool


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed.

    Attributes:
        version: such as "2.13.0+cpu".
        cuda: the CUDA it was built for, `None` for a build without.
    """

    version: str
    cuda: str | None

    @classmethod
    def installed(cls) -> TorchBuild:
        """Return the build that would be imported."""
        import torch

        return cls(str(torch.__version__), torch.version.cuda)


def unused_gpus(
    build: TorchBuild | None = None, root: Path = ROOT, environ: Mapping[str, str] | None = None
) -> UnusedGpus | None:
    """Say why torch, which sees no GPU, misses those of this machine; `None` where there are none, or they are hidden.

    Args:
        build: of torch; default the one that is installed.
        root: holds `dev` and `proc`.
        environ: default the process's.
    """
    environ = os.environ if environ is None else environ
    if are_hidden(environ):
        return None
    gpus = machine_gpus(root)
    if not gpus.num_known:
        return None
    here = f"this machine has {gpus.num_known} NVIDIA GPU{'s' if gpus.num_known > 1 else ''}"
    if not gpus.num_given:
        fix = (
            "start the job or the container with them (sbatch --gpus-per-node N, docker run --gpus all, apptainer exec "
            "--nv)."
        )
        return UnusedGpus(f"{here}, but this process was given none", fix, given=False)
    return _judge_build(here, gpus, build or TorchBuild.installed(), environ)


def _judge_build(here: str, gpus: MachineGpus, build: TorchBuild, environ: Mapping[str, str]) -> UnusedGpus:
    newest = newest_cuda(gpus.driver)
    too_old = f"driver {gpus.driver} takes CUDA {newest} at most"
    if build.cuda is None:
        seen = f"{here}, but torch {build.version} is a build without CUDA"
        first = f"update the driver ({too_old}), then " if newest is not None and newest not in TORCH_INDEX else ""
        return UnusedGpus(seen, first + _other_build(build, newest), given=True)
    if newest is not None and int(build.cuda.split(".")[0]) > newest:
        seen = f"{here}, but torch {build.version} is built for CUDA {build.cuda}, and {too_old}"
        other = f", or {_other_build(build, newest)}" if newest in TORCH_INDEX else "."
        return UnusedGpus(seen, f"update the driver{other}", given=True)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    seen = f"{here}, but torch {build.version}, built for CUDA {build.cuda}, sees none{hint}: {_reason_of_torch()}"
    fix = (
        "mend what it says; in a container, docker run --gpus all or apptainer exec --nv. rm-scale doctor looks again."
    )
    return UnusedGpus(seen, fix, given=True)


def _other_build(build: TorchBuild, newest: int | None) -> str:
    """Say how to install a torch that the driver takes, wherever there is a network: a node with GPUs may have none."""
    cuda = newest if newest in TORCH_INDEX else max(TORCH_INDEX)
    return (
        f"install a torch for CUDA {cuda}, on any machine that has a network and this environment: "
        f"{install_command(build, TORCH_INDEX[cuda])} (other indexes: https://pytorch.org/get-started/locally)."
    )


def _reason_of_torch() -> str:
    """Return torch's own message on why it has no GPU."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError or AssertionError, by build
        return one_line(error, 200).rstrip(".")
    return "it gives no reason"


def are_hidden(environ: Mapping[str, str]) -> bool:
    """Tell whether CUDA_VISIBLE_DEVICES says that no GPU is to be used."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip().lower() in _HIDDEN


def machine_gpus(root: Path = ROOT) -> MachineGpus:
    """Return the NVIDIA GPUs by the files of the driver, and by `nvidia-smi` where these show none that may be used.

    Args:
        root: holds `dev` and `proc`.
    """
    listed = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    nodes = [node for node in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)]
    # Slurm's control groups let nobody open the device of another job; this is asked for here, too.
    given = sum(os.access(node, os.R_OK | os.W_OK) for node in nodes)
    # The devices are made when the first program asks for them, and have other names under Windows.
    given = given or _num_listed_by_tool()
    return MachineGpus(max(listed, len(nodes), given), given, _driver_version(root))


def _num_listed_by_tool() -> int:
    try:
        return len(query_gpus("uuid"))
    except (subprocess.TimeoutExpired, OSError):
        return 0


def _driver_version(root: Path) -> str:
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)", text)
    return found.group(1) if found else ""


def newest_cuda(driver: str) -> int | None:
    """Return the newest CUDA, major version, that a driver takes; `None` where its version is not known."""
    major = driver.split(".")[0]
    if not major.isdigit():
        return None
    return next((cuda for least, cuda in CUDA_OF_DRIVER if int(major) >= least), 10)


def install_command(build: TorchBuild, index: str) -> str:
    """Return the shell command that puts another build of the same torch into this environment.

    Args:
        build: the one that is there.
        index: where it is to come from.
    """
    script = PACKAGE.parent / "tools" / "make_venv.sh"
    if script.is_file() and sys.prefix != sys.base_prefix:
        return f"RM_SCALE_TORCH_INDEX={index} {shlex.quote(str(script))} {shlex.quote(sys.prefix)}"
    python, version = shlex.quote(sys.executable), build.version.partition("+")[0]
    return f"{python} -m pip uninstall -y torch && {python} -m pip install torch=={version} --index-url {index}"
