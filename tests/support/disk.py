"""A disk in memory that knows what a power cut can leave of it, and that fails where it is told to.

An adapter of the file-system port (:mod:`edgefleet_shared.files`). It keeps apart what processes see and what is safe: bytes
are safe after their file's fsync, names after their folder's. :func:`remains` then enumerates what can be found after a cut at
this instant, in the way of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014): bytes that were not
synced are lost, torn, zero-filled or there, in any order; of the names that were not synced any subset is.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# A tree that came to rest: path -> bytes of a file, or None for a folder. "" is the root and not in it.
Tree = dict[str, "bytes | None"]

NAME_BYTES = 64  # what a name costs on a disk of limited capacity
MAX_SUBSETS_OF = 5  # changes of one folder whose every subset is tried: 32
MAX_PRODUCT = 128  # states of one instant for which every combination is tried


class Killed(BaseException):
    """The process is gone; nothing that runs afterwards reaches the disk."""


class Node:
    """A file or a folder. ``writes`` and ``changes`` are what is not safe yet, in order."""

    __slots__ = ("changes", "data", "names", "safe_data", "safe_names", "writes")

    def __init__(self, names: dict[str, Node] | None, data: bytes = b"") -> None:
        self.names, self.data, self.safe_data = names, data, data
        self.safe_names = dict(names) if names is not None else None
        self.writes: list[tuple[int, bytes]] = []
        self.changes: list[tuple[tuple[str, Node | None], ...]] = []


class MemoryDisk:
    """The port's methods over nodes in memory.

    ``fault`` is asked before each operation, with its number, name and path, and may raise what the operation then ends with.
    ``after`` is told after each operation that changed something.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self.root = Node({})
        self.fault: Callable[[int, str, str], None] | None = None
        self.after: Callable[[str, str], None] | None = None
        self.capacity_bytes: int | None = None
        self.count = 0
        self.dead = False
        self.log: list[str] = []
        self._open: dict[int, tuple[Node, str]] = {}
        self._position: dict[int, int] = {}
        self._next_fd = 100
        for path in sorted(tree or {}):
            content = tree[path]
            parent, name = self._parent(path)
            node = Node({}) if content is None else Node(None, content)
            parent.names[name] = node
            parent.safe_names[name] = node

    # -- the port ------------------------------------------------------------------------------------------------------

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        self._begin("open", path)
        node = self._find(str(path))
        changed = False
        if node is None:
            if not flags & os.O_CREAT:
                raise self._error(errno.ENOENT, path)
            parent, name = self._parent(str(path))
            self._need(NAME_BYTES, path)
            node = Node(None)
            parent.names[name] = node
            parent.changes.append(((name, node),))
            changed = True
        elif node.names is not None and not flags & os.O_DIRECTORY:
            raise self._error(errno.EISDIR, path)
        elif flags & os.O_TRUNC and node.data:
            node.data = b""
            node.writes.append((-1, b""))
            changed = True
        self._next_fd += 1
        self._open[self._next_fd] = (node, str(path))
        self._position[self._next_fd] = 0
        if changed:
            self._end("create", path)
        return self._next_fd

    def close(self, fd: int) -> None:
        _, path = self._open.pop(fd)  # as with the kernel, the descriptor is gone even when close fails
        self._begin("close", path)

    def read(self, fd: int, size_bytes: int) -> bytes:
        node, path = self._open[fd]
        self._begin("read", path)
        start = self._position[fd]
        piece = node.data[start : start + size_bytes]
        self._position[fd] = start + len(piece)
        return piece

    def pwrite(self, fd: int, piece: memoryview, offset: int) -> int:
        node, path = self._open[fd]
        self._begin("write", path)
        content = bytes(piece)
        if self.capacity_bytes is not None:
            room = self.capacity_bytes - self.used_bytes() + max(0, len(node.data) - offset)
            if room <= 0:
                raise self._error(errno.ENOSPC, path)
            content = content[:room]
        node.data = _overlaid(node.data, offset, content)
        node.writes.append((offset, content))
        self._end("write", path)
        return len(content)

    def fchmod(self, fd: int, mode: int) -> None:
        self._begin("fchmod", self._open[fd][1])

    def fsync(self, fd: int) -> None:
        node, path = self._open[fd]
        self._begin("fsync", path)
        if node.names is None:
            node.safe_data, node.writes = node.data, []
        else:
            node.safe_names, node.changes = dict(node.names), []
        self._end("fsync", path)

    def replace(self, source: Path, target: Path) -> None:
        self._begin("rename", source)
        parent, old = self._parent(str(source))
        other, new = self._parent(str(target))
        assert parent is other, "a rename between folders is not durable in one step: nobody here may use it"
        node = parent.names.get(old)
        if node is None:
            raise self._error(errno.ENOENT, source)
        there = parent.names.get(new)
        if there is not None and there.names is not None and (node.names is None or there.names):
            raise self._error(errno.EISDIR if node.names is None else errno.ENOTEMPTY, target)
        if there is not None and there.names is None and node.names is not None:
            raise self._error(errno.ENOTDIR, target)
        del parent.names[old]
        parent.names[new] = node
        parent.changes.append(((old, None), (new, node)))
        self._end("rename", target)

    def unlink(self, path: Path) -> None:
        self._begin("unlink", path)
        parent, name = self._parent(str(path))
        if name not in parent.names:
            raise self._error(errno.ENOENT, path)
        if parent.names[name].names is not None:
            raise self._error(errno.EISDIR, path)
        del parent.names[name]
        parent.changes.append(((name, None),))
        self._end("unlink", path)

    def mkdir(self, path: Path, mode: int) -> None:
        self._begin("mkdir", path)
        parent, name = self._parent(str(path))
        if name in parent.names:
            raise self._error(errno.EEXIST, path)
        self._need(NAME_BYTES, path)
        node = Node({})
        parent.names[name] = node
        parent.changes.append(((name, node),))
        self._end("mkdir", path)

    def names(self, folder: Path) -> list[str]:
        self._begin("list", folder)
        node = self._find(str(folder))
        if node is None or node.names is None:
            raise self._error(errno.ENOENT, folder)
        return list(node.names)

    def is_folder(self, path: Path) -> bool:
        self._begin("stat", path)
        node = self._find(str(path))
        return node is not None and node.names is not None

    def size_bytes(self, path: Path) -> int | None:
        self._begin("stat", path)
        node = self._find(str(path))
        return len(node.data) if node is not None and node.names is None else None

    def free_bytes(self, folder: Path) -> int:
        self._begin("statvfs", folder)
        return 1 << 40 if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes())

    # -- for tests -----------------------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """What processes see now."""
        tree: Tree = {}
        todo = [(self.root, "")]
        while todo:
            node, path = todo.pop()
            if node.names is None:
                tree[path] = node.data
                continue
            if path:
                tree[path] = None
            todo += [(other, f"{path}/{name}") for name, other in node.names.items()]
        return tree

    def calm(self) -> MemoryDisk:
        """The same nodes without faults, not counted and not watched: what a test, or another process, reads."""
        other = MemoryDisk()
        other.root = self.root
        return other

    def used_bytes(self) -> int:
        return sum(NAME_BYTES + len(content or b"") for content in self.tree().values())

    def _begin(self, operation: str, path: Path | str) -> None:
        if self.dead:
            raise Killed
        self.count += 1
        if self.fault is not None:
            self.fault(self.count, operation, str(path))

    def _end(self, operation: str, path: Path | str) -> None:
        self.log.append(f"{operation} {path}")
        if self.after is not None:
            self.after(operation, str(path))

    def _need(self, size: int, path: Path) -> None:
        if self.capacity_bytes is not None and self.capacity_bytes - self.used_bytes() < size:
            raise self._error(errno.ENOSPC, path)

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in filter(None, path.split("/")):
            node = node.names.get(part) if node is not None and node.names is not None else None
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        folder, _, name = path.rpartition("/")
        node = self._find(folder) if folder else self.root
        if node is None or node.names is None:
            raise self._error(errno.ENOENT, path)
        return node, name

    @staticmethod
    def _error(number: int, path: Path | str) -> OSError:
        return OSError(number, os.strerror(number), str(path))


def remains(disk: MemoryDisk) -> Iterator[Tree]:
    """Every tree that a power cut at this instant can leave, each once.

    Every combination of what may be left of each file and folder that is not safe, as long as there are no more than
    :data:`MAX_PRODUCT`; beyond, each of them alone, once with everything else kept and once with everything else lost.
    """
    folders, files = _unsafe(disk.root)
    ways: list[list[object]] = [list(_subsets(node.changes)) for node in folders]
    ways += [list(_contents(node)) for node in files]
    seen = set()
    for chosen in _combinations(ways):
        names = {id(node): _applied(node, changes) for node, changes in zip(folders, chosen, strict=False)}
        contents = dict(zip(map(id, files), chosen[len(folders) :], strict=True))
        tree = _settled(disk.root, names, contents)
        key = key_of(tree)
        if key not in seen:
            seen.add(key)
            yield tree


def key_of(tree: Tree) -> int:
    """A number for a tree's content; equal trees have equal ones."""
    return hash(frozenset(tree.items()))


def _unsafe(root: Node) -> tuple[list[Node], list[Node]]:
    """Folders and files with something that is not safe, that a name leads to or may lead to."""
    folders, files, todo, met = [], [], [root], set()
    while todo:
        node = todo.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if node.names is None:
            if node.writes:
                files.append(node)
            continue
        if node.changes:
            folders.append(node)
        todo += node.names.values()
        todo += node.safe_names.values()
        todo += [other for change in node.changes for _, other in change if other is not None]
    return folders, files


def _subsets(changes: list[tuple[tuple[str, Node | None], ...]]) -> Iterator[tuple[object, ...]]:
    """All of them first, none second: what :func:`_combinations` takes for "kept" and "lost"."""
    count = len(changes)
    yield tuple(changes)
    yield ()
    if count <= MAX_SUBSETS_OF:
        picks = itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(1, count))
    else:
        picks = itertools.chain(
            (tuple(range(n)) for n in range(1, count)),
            (tuple(range(n, count)) for n in range(1, count)),
            (tuple(i for i in range(count) if i != n) for n in range(count)),
            ((n,) for n in range(count)),
        )
    for pick in picks:
        yield tuple(changes[n] for n in pick)


def _contents(node: Node) -> Iterator[bytes]:
    """What may be left of a file's bytes: all, none; torn in its last write, zero-filled, each write alone missing or alone there."""
    writes = node.writes

    def put(pieces: list[tuple[int, bytes]]) -> bytes:
        content = node.safe_data
        for offset, piece in pieces:
            content = b"" if offset < 0 else _overlaid(content, offset, piece)
        return content

    def zeros(number: int) -> tuple[int, bytes]:
        offset, piece = writes[number]
        return offset, bytes(len(piece))

    last_offset, last = writes[-1]
    found = [node.data, node.safe_data]
    found.append(put([*writes[:-1], (last_offset, last[: len(last) // 2])]))
    found.append(put([zeros(n) for n in range(len(writes))]))
    found.append(put([*writes[:-1], (last_offset, last[: len(last) // 2] + bytes(len(last) - len(last) // 2))]))
    for number in range(len(writes)):
        found.append(put([w for n, w in enumerate(writes) if n != number]))
        found.append(put([zeros(n) if n == number else w for n, w in enumerate(writes)]))
        found.append(put([writes[number]]))
    yield from dict.fromkeys(found)


def _combinations(ways: list[list[object]]) -> Iterator[tuple[object, ...]]:
    size = 1
    for way in ways:
        size *= len(way)
    if size <= MAX_PRODUCT:
        yield from itertools.product(*ways)
        return
    for rest in (0, 1):
        others = [way[min(rest, len(way) - 1)] for way in ways]
        for number, way in enumerate(ways):
            for choice in way:
                yield (*others[:number], choice, *others[number + 1 :])


def _applied(node: Node, changes: tuple[tuple[tuple[str, Node | None], ...], ...]) -> dict[str, Node]:
    names = dict(node.safe_names)
    for change in changes:
        for name, other in change:
            if other is None:
                names.pop(name, None)
            else:
                names[name] = other
    return names


def _settled(root: Node, names: dict[int, dict[str, Node]], contents: dict[int, bytes]) -> Tree:
    """What is safe, but for the folders and files of which another choice was made."""
    tree: Tree = {}
    todo = [(root, "")]
    while todo:
        node, path = todo.pop()
        if node.names is None:
            tree[path] = contents.get(id(node), node.safe_data)
            continue
        if path:
            tree[path] = None
        for name, other in names.get(id(node), node.safe_names).items():
            todo.append((other, f"{path}/{name}"))
    return tree


def _overlaid(content: bytes, offset: int, piece: bytes) -> bytes:
    if offset > len(content):
        content += bytes(offset - len(content))
    return content[:offset] + piece + content[offset + len(piece) :]
