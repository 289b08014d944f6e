"""Three ways to start the same worker. An engine starts ranks and says how they ended; it knows nothing of video or text."""

from launch.engines.base import Engine, Outcome


def build(name: str) -> Engine:
    """The engine of that name. Its optional package is imported when it starts, not here.

    >>> build("torchrun").name
    'torchrun'
    """
    if name == "torchrun":
        from launch.engines.torchrun import Torchrun

        return Torchrun()
    if name == "ray":
        from launch.engines.ray import Ray

        return Ray()
    if name == "mpi":
        from launch.engines.mpi import Mpi

        return Mpi()
    raise ValueError(f"no engine {name!r}: there are torchrun, ray and mpi")


__all__ = ["Engine", "Outcome", "build"]
