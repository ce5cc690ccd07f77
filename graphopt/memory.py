"""The two measures of training memory: bytes saved for backward, and the peak of a step."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, whole storages, aliases counted once.

    `forward` runs once and returns what holds the graph, such as the loss; backward is not run.
    `own` names what would be in memory anyway and is left out: parameters, buffers, inputs. What is freed by the end of
    forward, as FSDP frees whole parameters, does not count; of a DTensor what this process has of it does.
    What an autograd.Function puts on its `ctx` without `save_for_backward` is not seen.
    """
    owned = {part.untyped_storage().data_ptr() for tensor in own for part in _parts(tensor)}
    saved: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in owned:
                saved[storage.data_ptr()] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # what a branch saved that nothing reads is gone by now, and does not count
    alive = [torch.UntypedStorage._new_with_weak_ptr(storage.cdata) for storage in saved.values()]
    del output
    return sum(storage.nbytes() for storage in alive if storage is not None)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that one is made of: itself, or those inside a DTensor, say."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:  # a DTensor's mesh is among them
            yield from _parts(part) if isinstance(part, Tensor) else ()
    else:
        yield tensor


def peak_bytes(step: Callable[[], object], device: torch.device | str) -> int:
    """Highest number of bytes allocated at once while `step` runs, above what was held when it began.

    `step` runs once and should be warm. On a GPU this asks the caching allocator; on CPU it sums the
    allocation events of torch.profiler, which see Inductor's buffers too, but no scratch memory of libraries
    and no freeing of what was allocated before: drop old gradients first.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes: list[int] = [event.nbytes() for event in events]
    return max(accumulate(changes, initial=0))
