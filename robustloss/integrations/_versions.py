"""Which releases of other frameworks an integration knows, and what to say where another one is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from robustloss._install import pip_install


def require(package: str, what: str, *, at_least: str, below: str | None = None) -> str:
    """The installed version of `package`, which `what` imports.

    Args:
        package: its name on PyPI.
        what: of robustloss, for the message.
        at_least, below: the versions that will do.

    Raises:
        ImportError: none is installed, or one out of range: what is needed, what was found, and the pip command.
    """
    wanted = f"{package}>={at_least}" + ("" if below is None else f",<{below}")
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(
            f"{what} needs {wanted}, and {package} is not installed: {pip_install(wanted)}", name=package
        ) from None
    from packaging.version import Version  # which every framework here depends on

    if Version(found) < Version(at_least) or (below is not None and Version(found) >= Version(below)):
        raise ImportError(f"{what} needs {wanted}, and {package} {found} is installed: {pip_install(wanted)}")
    return found


def require_trl(what: str, *, at_least: str = "1.0") -> str:
    """As `require`, of TRL; 2 may have other trainers."""
    return require("trl", what, at_least=at_least, below="2")


def require_methods(trainer: type, what: str, *names: str) -> None:
    """Refuse a trainer that lacks a method which `what` calls or overrides, as one of another release may.

    Raises:
        ImportError: names the method, and the installed release.
    """
    package = trainer.__module__.partition(".")[0]
    missing = [name for name in names if not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"{what} needs {', '.join(missing)} of {trainer.__name__}, which {package} {version(package)} has not; "
            "update robustloss, or install the release that its documentation names"
        )
