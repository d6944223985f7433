"""Checkpoints written behind the training loop's back: it waits for a copy in host memory, a thread of each process does the rest.

All processes write their pieces into one temporary folder, tell each other how it went, and the first one makes a checkpoint of it. What
fails anywhere fails everywhere, and leaves the earlier checkpoints as they are.
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

from lumi.checkpoint.checkpoint import describe, seal_checkpoint, tensor_file
from lumi.config import UserError
from lumi.host.storage import atomic_folder
from lumi.host.tensor_files import save_tensors
from lumi.parallel.tensor_pieces import Piece, own_pieces

Key = tuple[str, str]  # group ("model", "optimizer"), tensor name
Description = dict[str, dict[str, dict[str, Any]]]  # by group and tensor name


class Saver:
    """Saves checkpoints of one run, one at a time. Used as a context, or closed: then no save is lost at the program's end."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        """
        Args:
            folder: where `step-XXXXXXXX` appear; on a disk that all processes share.
            rank, size: of the default process group.
            group: of the same processes, on gloo, for the saver alone; None for one process. Its time limit must be longer than a save.
        """
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
        """Begin to save `step-XXXXXXXX`, on all processes together; waits for the save before it. Tensors may change as soon as it returns.

        Args:
            tensors: by group and name: DTensors on a mesh of all processes, or plain ones that are the same on all.
            state: plain JSON values.
            finish: called with the checkpoint's path when it is whole, on rank 0, in the saver's thread.

        Returns:
            seconds that the caller was stalled.

        Raises:
            UserError: the save before it failed.
        """
        start = time.perf_counter()
        self.wait()
        own = own_pieces(
            {(group, name): tensor for group in tensors for name, tensor in tensors[group].items()},
            self.rank,
            self.size,
        )
        groups = {
            group: {name: describe(tensor) for name, tensor in named.items()}
            for group, named in tensors.items()
        }
        values = json.loads(
            json.dumps({**state, "step": step}, allow_nan=False)
        )  # a copy, and refused here if it is not JSON
        pieces = self._stage(own)
        self._running = self._executor.submit(
            self._save, self.folder / f"step-{step:08d}", pieces, groups, values, finish
        )
        return time.perf_counter() - start

    @property
    def progress(self) -> tuple[int, int]:
        """The parts of saves that this process has done, and the chunks that it has written.

        `lumi.parallel.watchdog` reads them: a save that moves is no hang.
        """
        return self._parts, self._chunks

    @property
    def failed(self) -> bool:
        """Whether the last save is known to have failed; `wait` says why. For a moment it may differ between processes."""
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
            if kind is None:  # otherwise what ended the block has been said
                raise

    def _stage(self, own: dict[Key, Piece]) -> dict[Key, Piece]:
        """Copy pieces to host memory, which is kept for the next save: pinned for CUDA, so that copies run at the bus's full speed."""
        staging, self._staging = self._staging, {}
        staged = {}
        for key, (local, offset, shape) in own.items():
            buffer = staging.pop(key, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._staging[key] = buffer.copy_(local, non_blocking=True)
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
        """What the thread does: make the folder, write, seal and rename it, finish; all processes go from one to the next together."""
        failure = f"{path}: cannot be written"
        with contextlib.ExitStack() as unfinished:

            def make_folder() -> str | None:
                return (
                    unfinished.enter_context(atomic_folder(path, replace=True)).name
                    if self.rank == 0
                    else None
                )

            temporary = path.parent / self._together(failure, make_folder)[0]
            written = self._together(failure, lambda: self._write(temporary, pieces))

            def complete() -> None:
                if self.rank == 0:
                    for _, entries in written:
                        for (group, name), entry in entries.items():
                            groups[group][name]["pieces"].append(entry)
                    seal_checkpoint(
                        temporary,
                        state,
                        groups,
                        {file: record for records, _ in written for file, record in records.items()},
                    )
                    unfinished.close()

            self._together(failure, complete)
        remedy = "the checkpoint is whole, resume from it"
        self._together(
            f"{path}: was saved, but not what follows",
            lambda: finish(path) if self.rank == 0 else None,
            remedy,
        )

    def _write(
        self, temporary: Path, pieces: dict[Key, Piece]
    ) -> tuple[dict[str, dict[str, Any]], dict[Key, dict[str, Any]]]:
        """Write this process's files. Returns their records, and where the pieces lie."""
        if not temporary.is_dir():
            raise UserError(
                "the folder must be on a disk that all processes share, got one that only the first can see"
            )
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
        """Do a part of a save. Returns what it returned on every process, when all are done.

        Raises:
            UserError: the same on all, if it failed on any.
        """
        result, fault = None, "an unexpected error"
        try:
            result, fault = work(), ""
        except (OSError, ValueError) as error:
            fault = (isinstance(error, OSError) and error.strerror) or str(error)
        finally:  # whatever happened, nobody is left waiting
            self._parts += 1
            outcomes: list[Any] = [(result, fault)] * self.size
            if self.group is not None:
                dist.all_gather_object(outcomes, (result, fault), group=self.group)
        for rank, (_, fault) in enumerate(outcomes):
            if fault:
                where = f"rank {rank}: " if self.size > 1 else ""
                raise UserError(f"{failure}: {where}{fault}; {remedy}")
        return [result for result, _ in outcomes]
