"""seamless_lite names a computation by the SHA-256 of its code and inputs, keeps the result, and runs it
where the configuration says: in this process, in worker processes, on a jobserver, or on a Dask cluster.

    from seamless_lite import direct, delayed, parallel
    import seamless_lite.config
    seamless_lite.config.init()

Importing this package starts nothing and imports next to nothing: the names below are loaded when first used.
"""
__version__ = "0.1.0"

_HOME = {
    "direct": "transformer", "delayed": "transformer", "Transformer": "transformer",
    "Transformation": "handle",
    "parallel": "batch", "parallel_async": "batch", "TransformationList": "batch",
    "spawn": "config", "has_spawned": "config",
    "Checksum": "checksum", "Buffer": "celltypes",
    "SeamlessError": "errors", "CacheMissError": "errors", "JobError": "errors",
    "ConfigurationError": "errors", "config": None,
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    import importlib
    module = importlib.import_module("." + (_HOME[name] or name), __name__)
    value = module if _HOME[name] is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_HOME))
