"""Checkpoints written behind the training loop's back.

The loop only waits for a copy in host memory; a thread of each process does the rest. All processes write
their pieces into one temporary folder and tell each other how it went. Then the first process makes a
checkpoint of the folder. What fails on any process fails on all, and leaves the earlier checkpoints as they
are.
"""

import atexit
import concurrent.futures
import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumi.checkpoint.manifest import describe_tensor, seal_checkpoint, tensor_file
from lumi.config import UserError
from lumi.host.storage import atomic_folder
from lumi.host.tensor_files import save_tensors
from lumi.parallel.tensor_pieces import Piece, own_pieces

Key = tuple[str, str]  # group ("model", "optimizer"), tensor name
Description = dict[str, dict[str, dict[str, Any]]]  # by group and tensor name


class Saver:
    """Saves checkpoints of one run, one at a time.

    Use it as a context or call `close`, so that no save is lost at the program's end.

    Args:
        folder: where `step-XXXXXXXX` appear; on a disk that all processes share.
        rank, size: of the default process group.
        group: of the same processes, on gloo, for the saver alone; its time limit must be longer than a save.
            None for one process.
    """

    def __init__(self, folder: Path, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        self.folder, self.rank, self.size, self.group = Path(folder), rank, size, group
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._running: Future[None] | None = None
        self._staging: dict[Key, Tensor] = {}
        self._parts = self._chunks = 0
        atexit.register(self.close)

    def begin(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        finish: Callable[[Path], None] = lambda path: None,
    ) -> float:
        """Begin to save `step-XXXXXXXX`; all processes call it together. It waits for the save before it.

        Tensors may change as soon as it returns.

        Args:
            tensors: by group and name: DTensors on a mesh of all processes, or plain ones, equal on all.
            state: plain JSON values.
            finish: called on rank 0 with the checkpoint's path when it is whole, in the saver's thread.

        Returns:
            seconds that the caller was stalled.

        Raises:
            UserError: the save before it failed.
        """
        start = time.perf_counter()
        self.wait()
        flat = {(group, name): tensor for group in tensors for name, tensor in tensors[group].items()}
        groups: Description = {group: {} for group in tensors}
        for (group, name), tensor in flat.items():
            groups[group][name] = describe_tensor(tensor)
        # A copy; what is not JSON is refused here.
        values = json.loads(json.dumps({**state, "step": step}, allow_nan=False))
        pieces, path = self._stage(own_pieces(flat, self.rank, self.size)), self.folder / f"step-{step:08d}"
        self._running = self._executor.submit(self._save, path, pieces, groups, values, finish)
        return time.perf_counter() - start

    @property
    def progress(self) -> tuple[int, int]:
        """The parts of saves that this process has completed, and the chunks that it has written.

        `lumi.parallel.watchdog` reads them: a save that advances is not a hang.
        """
        return self._parts, self._chunks

    @property
    def failed(self) -> bool:
        """Whether the last save is known to have failed; `wait` says why. Processes may learn of it apart."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Wait until no save is running. Raises UserError, the same on every process, if it failed on any."""
        if self._running is not None:
            concurrent.futures.wait([self._running])
            ended, self._running = self._running, None
            ended.result()

    def close(self) -> None:
        """Wait for the running save, and end. Raises as `wait`."""
        atexit.unregister(self.close)
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the exception that ended the block matters more
                raise

    def _stage(self, own: dict[Key, Piece]) -> dict[Key, Piece]:
        """Copy pieces to host memory, which is kept for the next save.

        For CUDA the memory is pinned, so that copies run at the full speed of the bus.
        """
        staging, self._staging = self._staging, {}
        staged = {}
        for key, (local, offset, shape) in own.items():
            buffer = staging.pop(key, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._staging[key] = buffer.copy_(local, non_blocking=local.is_cuda)
            staged[key] = Piece(buffer, offset, shape)
        if any(piece.local.is_cuda for piece in own.values()):
            torch.cuda.current_stream().synchronize()
        return staged

    def _save(
        self,
        path: Path,
        pieces: dict[Key, Piece],
        groups: Description,
        state: dict[str, Any],
        finish: Callable[[Path], None],
    ) -> None:
        """The work of the thread: make the folder, write, seal and rename it, finish.

        All processes take each of these steps together.
        """
        failure = f"{path}: cannot be written"
        with contextlib.ExitStack() as unfinished:

            def make_folder() -> str | None:
                if self.rank:
                    return None
                return unfinished.enter_context(atomic_folder(path, replace=True)).name

            temporary = path.parent / self._together(failure, make_folder)[0]
            written = self._together(failure, lambda: self._write(temporary, pieces))

            def complete() -> None:
                if self.rank:
                    return
                records: dict[str, dict[str, Any]] = {}
                for its_records, entries in written:
                    records |= its_records
                    for (group, name), entry in entries.items():
                        groups[group][name]["pieces"].append(entry)
                seal_checkpoint(temporary, state, groups, records)
                unfinished.close()

            self._together(failure, complete)
        self._together(
            f"{path}: was saved, but not what follows",
            lambda: finish(path) if self.rank == 0 else None,
            remedy="the checkpoint is whole, resume from it",
        )

    def _write(
        self, temporary: Path, pieces: dict[Key, Piece]
    ) -> tuple[dict[str, dict[str, Any]], dict[Key, dict[str, Any]]]:
        """Write this process's files. Returns their records, and where the pieces lie."""
        if not temporary.is_dir():
            got = "one that only the first can see"
            raise UserError("the folder", "must be on a disk that all processes share", got=got)
        records, entries = {}, {}
        for group in sorted({group for group, _ in pieces}):
            file = tensor_file(group, self.rank)
            tensors = {name: piece.local for (of, name), piece in pieces.items() if of == group}
            records[file] = save_tensors(temporary / file, tensors, moved=self._moved)
            for key, piece in pieces.items():
                if key[0] == group:
                    entries[key] = {
                        "file": file,
                        "offset": list(piece.offset),
                        "shape": list(piece.local.shape),
                    }
        return records, entries

    def _moved(self) -> None:
        self._chunks += 1

    def _together(
        self,
        failure: str,
        work: Callable[[], Any],
        remedy: str = "earlier checkpoints are intact, resume from them",
    ) -> list[Any]:
        """Do a part of a save, and wait for the other processes to do theirs. Returns the result of each.

        Raises:
            UserError: the same on all, if it failed on any.
        """
        result, fault = None, "an unexpected error"
        try:
            result, fault = work(), ""
        except (OSError, ValueError) as error:
            fault = str(error)
            if isinstance(error, OSError) and error.strerror:
                fault = error.strerror
        finally:  # whatever happened, nobody is left waiting
            self._parts += 1
            outcomes: list[Any] = [(result, fault)] * self.size
            if self.group is not None:
                dist.all_gather_object(outcomes, (result, fault), group=self.group)
        for rank, (_, fault) in enumerate(outcomes):
            if fault:
                where = f"rank {rank}: " if self.size > 1 else ""
                raise UserError(f"{failure}: {where}{fault}", remedy=remedy)
        return [result for result, _ in outcomes]
