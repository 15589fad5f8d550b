"""Open a model in the state that a public function needs. Everything below passes the opened :class:`Host` on."""

from __future__ import annotations

from torch import nn

from cpvit.adapters import Host, open_host
from cpvit.pruning.install import CascadeContainer, installed, uninstall


def open_restored(model: nn.Module) -> Host:
    """The model, unpruned first if it is pruned.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: It was loaded with heads cut, so it cannot be restored.
    """
    host = open_host(model)
    unprune_host(host)
    return host


def open_as_it_is(model: nn.Module) -> tuple[Host, CascadeContainer | None]:
    """The model, and its cascade if it is pruned.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
    """
    host = open_host(model)
    return host, installed(host)


def open_untouched(model: nn.Module, verb: str) -> Host:
    """The model, which must not be pruned; ``verb`` says what for.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: It is pruned already.
    """
    host, container = open_as_it_is(model)
    if container is not None:
        raise ValueError(
            f"{host.name} is pruned already; {verb} the untouched model: call unprune_(model) first"
        )
    return host


def open_pruned(model: nn.Module) -> tuple[Host, CascadeContainer]:
    """The model, which must be pruned, and its cascade.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: It is not pruned.
    """
    host, container = open_as_it_is(model)
    if container is None:
        raise ValueError(f"{host.name} is not pruned; call prune_(model) first")
    return host, container


def unprune_host(host: Host) -> None:
    """Restore the untouched model, bit for bit; nothing happens if it is not pruned.

    Raises:
        ValueError: It was loaded with heads cut: what they were is not in the file.
    """
    container = installed(host)
    if container is None:
        return
    if container.heads_lost:
        raise ValueError(
            f"{host.name} was saved with heads cut, so their weights are lost and it cannot be unpruned or pruned "
            "anew; start from the weights it was pruned from"
        )
    uninstall(host)
    for cut in container.cut_heads:
        cut.restore()
