"""The adapters of this distribution, by the entry points that it declares."""

from importlib.metadata import entry_points

ADAPTERS = {
    point.name: point.load() for point in entry_points(group="rau.backends") if point.dist.name == "rau-peers"
}
