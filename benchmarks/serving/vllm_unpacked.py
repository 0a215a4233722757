"""Imported by a vLLM worker on the CPU (`worker_extension_cls`): it computes with weights as they are loaded, unpacked,
as on a GPU, so that single positions can be written."""

import vllm._custom_ops as ops

ops._supports_onednn = False


class Unpacked:
    """Adds nothing to the worker."""
