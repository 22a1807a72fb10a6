"""What this installation is made of: show_config, and the data behind ``python -m rau info``."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from rau import registry
from rau.constraints.rules import Violations
from rau.errors import RauError
from rau.threads import get_num_threads, threads_origin

# Every environment variable that rau reads.
ENVIRONMENT = {
    "RAU_BACKEND": "name of the backend that runs every call, strictly; use_backend and backend= override it",
    "RAU_BLOCK": "comma-separated names of backends that are never loaded",
    "RAU_SIMD": 'instruction-set version of the compiled core: "baseline", "avx2" or "avx512"; the same bits',
    "RAU_TEST_BACKENDS": "test suite: names of the backends that must be present and are tested",
    "RAU_EXPECT_NO_CORE": "test suite: set to 1 where the compiled core is meant to be missing",
    "RAU_TEST_PATIENCE": "test suite: how many times as long to wait before something is said to hang, as under an emulator",
    "RAU_BENCH_LARGE": "asv_bench: set to 1 to measure sizes above 64 MB and torch.compile too",
    "RAU_BUILD_REQUIRE_CORE": "build: set to 1 to make the install fail where compilation fails",
}
_PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "mindspore", "rich")


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution; None where there is none."""
    from importlib.metadata import (  # slow to import, and needed here alone
        PackageNotFoundError,
        version,
    )

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Name the processor, for which Python knows no more than its kind on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as told:
            model = next((line.partition(":")[2].strip() for line in told if line.startswith("model name")), "")
    except OSError:
        model = platform.processor()
    return f", {model}" if model else ""


def _core() -> dict[str, Any]:
    try:
        from rau._core import build, forked, simd, simd_versions
    except ImportError as error:
        from rau.backends.cython_ import missing  # where there is no core

        cost = "the numpy backend runs instead: the same bits, several times slower, on one thread"
        return {"compiled": False, "missing": missing(error), "cost": cost}
    core = {"compiled": True, **build(), "simd": simd(), "simd_versions": simd_versions()}
    if not core["openmp"]:
        core["missing"] = "the compiler had no OpenMP when the core was built"
        core["cost"] = "one thread: a problem that fits in the cache takes about twice as long on two CPUs as it could"
    if forked():
        core["forked"] = "this process is a forked child and runs serially"
    return core


def _choice() -> dict[str, str]:
    """Which backend runs a call on NumPy arrays now, and what chose it."""
    name, origin = registry.requested()
    if name is not None:
        choice = {"backend": name, "origin": origin}
        try:
            if "numpy:ndarray" not in registry.get(name, origin).capabilities.array_types:
                choice["error"] = f'backend "{name}" takes no NumPy arrays'
        except RauError as error:
            choice["error"] = str(error)
        return choice
    available = {status.name for status in registry.status() if status.available}
    first = next((name for name in ("cython", "numpy") if name in available), "none")
    return {"backend": first, "origin": origin}


def collect() -> dict[str, Any]:
    """Gather what :func:`show_config` prints.

    Returns
    -------
    dict
        Plain data, ready for JSON.
    """
    statuses = [status._asdict() for status in registry.status()]  # loads them, RAU_SIMD is read there
    threads: dict[str, Any] = {"number": get_num_threads(), "origin": threads_origin()}
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("RAU_")}
    return {
        "versions": {
            "rau": version_of("ring-attention-update") or "not installed: running from a source tree",
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := version_of(name))},
        },
        "platform": f"{platform.platform()} {platform.machine()}, {os.cpu_count()} CPUs{_processor()}",
        "core": _core(),
        "threads": threads,
        "backends": statuses,
        "choice": _choice(),
        "environment": {name: {"value": value, "note": _variable_note(name)} for name, value in variables.items()},
    }


def _variable_note(name: str) -> str:
    if name in ENVIRONMENT:
        strangers = sorted(registry.blocked() - set(registry.names())) if name == "RAU_BLOCK" else []
        return ENVIRONMENT[name] + (f"; no backend is called {', '.join(strangers)}" if strangers else "")
    import difflib

    known = {variable.removeprefix("RAU_"): variable for variable in ENVIRONMENT}
    close = difflib.get_close_matches(name.removeprefix("RAU_"), known, n=1)
    return "rau reads no such variable" + (f'; did you mean "{known[close[0]]}"?' if close else "")


def render(config: dict[str, Any]) -> str:
    """Format what :func:`collect` gathered, one fact per line.

    Parameters
    ----------
    config : dict

    Returns
    -------
    str
    """
    lines = ["versions: " + ", ".join(f"{name} {version}" for name, version in config["versions"].items())]
    lines.append(f"platform: {config['platform']}")
    core = config["core"]
    if core["compiled"]:
        lines.append(f"compiled core: yes, {core['compiler']}, flags: {core['flags']}")
        lines.append(f"  instruction set: {core['simd']} (of {', '.join(core['simd_versions'])})")
        lines.append(f"  OpenMP: {'yes' if core['openmp'] else 'no'}")
    else:
        lines.append("compiled core: no")
    lines += [f"  {key}: {core[key]}" for key in ("missing", "cost", "forked") if key in core]
    lines.append(f"threads: {config['threads']['number']} (from {config['threads']['origin']})")
    lines.append("backends:")
    width = max(len(status["name"]) for status in config["backends"])
    for status in config["backends"]:
        reason = f": {status['reason']}" if status["reason"] else ""
        lines.append(f"  {status['name']:{width}}  {status['state']}{reason} ({status['origin']})")
    choice = config["choice"]
    lines.append(f"NumPy arrays run on: {choice['backend']} ({choice['origin']})")
    if "error" in choice:
        lines.append(f"  but calls fail: {choice['error']}")
    lines.append("environment variables set:" if config["environment"] else "environment variables set: no RAU_*")
    lines += [f"  {name}={entry['value']}: {entry['note']}" for name, entry in config["environment"].items()]
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a variable may hold what a terminal cannot show
    return "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show versions, the compiled core, threads, the state of each backend with the reason, and settings.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Print the data, or return it, as `numpy.show_config` does.

    Returns
    -------
    dict or None

    Raises
    ------
    OptionError
        If `mode` is neither.

    Examples
    --------
    >>> config = show_config(mode="dicts")
    >>> sorted(config)
    ['backends', 'choice', 'core', 'environment', 'platform', 'threads', 'versions']
    """
    report = Violations("show_config")
    report.choice("mode", "mode", mode, ("stdout", "dicts"))
    report.raise_if_broken()
    if mode == "dicts":
        return collect()
    sys.stdout.write(render(collect()) + "\n")
    return None
