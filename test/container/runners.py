"""Run an image as the platform would: no network, read-only root, no capability, no new privileges, an arbitrary uid.

With docker or podman by their own options. With buildah, which builds and cannot run under such limits, by bubblewrap on the
mounted image; that takes root, for the uid is changed for good and not only in name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

UID = 54321  # nobody's, in the image and here
PROCESSES = 256
MEMORY = 16 << 30  # bytes
SHARED_MEMORY = 128 << 20  # bytes


class RunnerError(Exception):
    """The image could not be run at all; the message is one line."""


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        read: path in the container -> folder here, mounted read-only.
        write: path in the container -> folder here, mounted writable.
        environment: variables on top of the image's.
        entrypoint: instead of the image's.
        arguments: after the entry point.
    """

    read: dict[str, Path]
    write: dict[str, Path]
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How it went: the exit status, each line of stdout with the second in which it came, stderr, the seconds in all."""

    status: int
    stdout: list[tuple[float, str]]
    stderr: str
    seconds: float

    @property
    def log(self) -> str:
        return "\n".join(line for _, line in self.stdout)


class Running:
    """A container that was started."""

    def __init__(self, command: list[str], stop: list[str] | None) -> None:
        self.stop_command = stop
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        self.lines: list[tuple[float, str]] = []
        self.errors: list[str] = []
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read_stdout, self._read_stderr)]
        for reader in self.readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.started, line.rstrip("\n")))

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def terminate(self) -> None:
        """Send SIGTERM to the first process in the container, as a platform does that wants it to end."""
        if self.stop_command is not None:
            subprocess.run(self.stop_command, check=True, capture_output=True)
            return
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if self.process.poll() is not None or not children.read_text(encoding="ascii"):
            raise RunnerError(f"it has ended already: {''.join(self.errors)[-1000:]}")
        os.kill(int(children.read_text(encoding="ascii").split()[0]), signal.SIGTERM)

    def wait(self, timeout: float) -> Outcome:
        """Wait for its end; past ``timeout`` seconds it is killed, and a RunnerError raised."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            last = [line for _, line in self.lines[-5:]]
            raise RunnerError(f"still running after {timeout:g} s; killed. Last lines: {last}") from None
        seconds = time.monotonic() - self.started
        for reader in self.readers:
            reader.join()
        return Outcome(status, self.lines, "".join(self.errors), seconds)


class EngineRunner:
    """docker or podman."""

    def __init__(self, engine: str, image: str) -> None:
        self.engine, self.image = engine, image
        self.limits = f"{engine}: /input is a plain mount (no symlink), HOME is the engine's"

    def start(self, task: Task) -> Running:
        name = f"dinoreg-check-{uuid.uuid4().hex[:12]}"
        command = [self.engine, "run", "--rm", "--name", name, "--network", "none", "--read-only", "--cap-drop", "ALL",
                   "--security-opt", "no-new-privileges", "--pids-limit", str(PROCESSES), "--memory", str(MEMORY),
                   "--memory-swap", str(MEMORY), "--shm-size", str(SHARED_MEMORY), "--tmpfs", "/tmp:rw,mode=1777",
                   "--user", f"{UID}:{UID}"]
        for target, source in task.read.items():
            command += ["--volume", f"{source.resolve()}:{target}:ro"]
        for target, source in task.write.items():
            command += ["--volume", f"{source.resolve()}:{target}"]
        for variable, value in task.environment.items():
            command += ["--env", f"{variable}={value}"]
        if task.entrypoint is not None:
            command += ["--entrypoint", task.entrypoint]
        return Running([*command, self.image, *task.arguments], [self.engine, "kill", "--signal", "TERM", name])

    def close(self) -> None:
        """Nothing is held."""


class BubblewrapRunner:
    """bubblewrap on an image that buildah mounts."""

    limits = f"bubblewrap: {PROCESSES} processes and {MEMORY >> 30} GB of address space by rlimit"

    def __init__(self, image: str) -> None:
        for tool in ("buildah", "bwrap", "prlimit"):
            if shutil.which(tool) is None:
                raise RunnerError(f"{tool} is not installed; expected docker, podman, or buildah with bubblewrap")
        if os.geteuid() != 0:
            raise RunnerError("bubblewrap with another uid takes root; run as root, or use docker")
        inspected = json.loads(self._buildah("inspect", "--type", "image", image))
        self.config = inspected["OCIv1"]["config"]
        self.container = self._buildah("from", "--pull-never", image)
        self.root = Path(self._buildah("mount", self.container))

    @staticmethod
    def _buildah(*arguments: str) -> str:
        done = subprocess.run(["buildah", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise RunnerError(f"buildah {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self, task: Task) -> Running:
        command = ["prlimit", f"--nproc={PROCESSES}", f"--as={MEMORY}", "bwrap", "--unshare-net", "--unshare-pid",
                   "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--as-pid-1", "--new-session", "--clearenv",
                   "--tmpfs", "/", "--perms", "0755", "--dir", "/mounted"]
        for entry in sorted(self.root.iterdir()):
            target = f"/{entry.name}"
            if entry.name in ("proc", "dev", "sys", "tmp") or target in task.read or target in task.write:
                continue
            command += ["--symlink", str(entry.readlink()), target] if entry.is_symlink() else ["--ro-bind", str(entry), target]
        command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(SHARED_MEMORY),
                    "--tmpfs", "/dev/shm", "--perms", "1777", "--tmpfs", "/tmp"]
        for target, source in task.read.items():
            place = f"/mounted{target}" if target == "/input" else target  # the platform's /input is a symlink
            command += ["--ro-bind", str(source.resolve()), place]
            if place != target:
                command += ["--symlink", place, target]
        for target, source in task.write.items():
            command += ["--bind", str(source.resolve()), target]
        command += ["--remount-ro", "/", "--chdir", self.config.get("WorkingDir") or "/"]
        for variable, value in {**dict(item.split("=", 1) for item in self.config["Env"]), **task.environment}.items():
            command += ["--setenv", variable, value]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # for setpriv, which gives them up
            command += ["--cap-add", capability]
        entrypoint = [task.entrypoint] if task.entrypoint is not None else self.config["Entrypoint"]
        return Running([*command, "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--no-new-privs",
                        "--bounding-set", "-all", "--inh-caps", "-all", *entrypoint, *task.arguments], None)

    def close(self) -> None:
        """Unmount the image."""
        self._buildah("rm", self.container)


def find_runner(engine: str, image: str) -> EngineRunner | BubblewrapRunner:
    """The runner for images that ``engine`` built; raises RunnerError."""
    return BubblewrapRunner(image) if engine == "buildah" else EngineRunner(engine, image)
