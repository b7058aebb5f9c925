"""Where a result came from: code, commit, package versions, device and date."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from replicate.system import paths

PACKAGE = Path(__file__).resolve().parent.parent
# Files and folders of the package that decide a result: a cached record made by other code is not reused.
DECIDES = ("config.py", "sparsity.py", "router.py", "ffn.py", "gpt.py", "data.py", "schedule.py", "train.py")
DECIDES += ("evaluate.py", "ablations.py", "text", "training", "kernels", "diffusion")


def provenance(device: str = "auto") -> dict[str, Any]:
    """Device, versions (packages, Python, the code's fingerprint), commit and date, as Record's fields."""
    return {
        "device": device_name(device),
        "versions": {**_versions(), "code": code_fingerprint()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """First 16 hex digits of SHA-256 over the modules that decide a result, as they were first asked for."""
    return fingerprint(PACKAGE)


def fingerprint(package: Path) -> str:
    """`code_fingerprint` of the package in a folder, as it is now."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] in DECIDES:
            # Newlines as git stores them, so that a Windows checkout agrees.
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, with "+" if the package was changed since; REPLICATE_COMMIT overrides."""
    if stated := os.environ.get("REPLICATE_COMMIT"):
        return stated
    try:
        head = _git("rev-parse", "HEAD")
        return head[:12] + ("+" if _git("status", "--porcelain", "--", "replicate") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@lru_cache(maxsize=8)
def device_name(kind: str = "auto") -> str:
    """The GPU's name, or the processor's where there is none or `kind` is "cpu"."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({_processor()})"


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in ("replicate", "torch", "triton", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"
