"""A directory below which nothing is followed: every name is looked up relative to an open descriptor.

Invariant 10 of docs/architecture.md lives here. A component is opened with O_NOFOLLOW from its parent's
descriptor, never by a longer path, so that a directory swapped for a link at any moment is not followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from ..errors import AmstError, NotFoundError, RefusedError, StorageError, error_from_os
from .entries import (
    HIDDEN_PREFIX,
    MAX_DEPTH,
    MAX_PATH,
    Entry,
    EntryType,
    WalkError,
    display_path,
    entry_type,
    is_legal_name,
    join_path,
    special_name,
    split_path,
)
from .journal import Fsync, SourceMark
from .partial import PART, PartialPolicy, Partials, has_partial, temporary_name
from .sink import FileSink, set_times, target_error
from .source import MIN_HOLE, Descriptor, FileSource, source_changed

_PASS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To go through a directory: asks for search permission only."""

_LIST: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK, because a FIFO put in the file's place must not hang the opener."""

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UNNAMED: Final = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC

_NO_UNNAMED: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
"""What a file system, or a kernel, without unnamed files answers."""


@dataclass(slots=True)
class _Level:
    """A directory that `Root.walk` is inside of."""

    fd: int
    entry: Entry
    names: Iterator[bytes]


class Root:
    """The tree below one directory, for reading and writing. All methods may be called from any thread.

    ``path`` is resolved as usual, once; from then on the open directory counts, not its name. ``forbidden``
    lists directories as ``(st_dev, st_ino)`` that are out of reach below it and that it must not lie in. ``partials``
    says how long what broken copies left stays below it.

    Raises:
        NotFoundError, RefusedError: there is no such directory, it may not be entered, or it is forbidden.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str],
        *,
        forbidden: Sequence[tuple[int, int]] = (),
        partials: PartialPolicy | None = None,
    ) -> None:
        shown = display_path(os.fsencode(path))
        self._partials = Partials(partials)
        self._forbidden = frozenset(forbidden)
        try:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise error_from_os(err, "cannot open the directory", path=shown) from err
        self._descriptor = Descriptor(fd, shown=f"root {shown}")
        try:
            if self._forbidden and self._lies_in_forbidden(fd):
                raise RefusedError(
                    f"{shown} is or lies in a directory that AMST keeps for itself; choose another", path=shown
                )
        except BaseException:
            self.close()
            raise

    # ---- looking up ---------------------------------------------------------------------

    @contextlib.contextmanager
    def parent(self, path: bytes, *, create: bool = False) -> Iterator[tuple[int, bytes]]:
        """The directory that holds ``path``, as a descriptor for the length of the block, and the last component.

        ``create`` makes what is missing on the way. Nothing is said about the last component itself.

        Raises:
            RefusedError: ``path`` is the root, not a legal path, passes a link or a forbidden directory, or
                permission is missing.
            NotFoundError: a directory on the way is missing (without ``create``).
            StorageError: a name or the path is too long, or the file system failed.
        """
        fd, leaf = self._open_parent(path, create=create)
        try:
            yield fd, leaf
        finally:
            os.close(fd)

    def stat(self, path: bytes) -> Entry | None:
        """What is at ``path`` (a link is a link), or None when there is nothing.

        Raises:
            RefusedError: as `parent`; or it is neither file, directory nor link; or it is forbidden.
        """
        if not split_path(path):
            with self._descriptor as fd:
                return self._describe(fd, b".", path, os.fstat(fd))
        try:
            with self.parent(path) as (fd, leaf):
                found = self._look(fd, leaf, path, full=path)
        except NotFoundError:
            return None
        if found is None:
            raise _out_of_reach(display_path(path))
        return found

    def open_source(self, path: bytes) -> FileSource:
        """Open the regular file at ``path`` for sending; the caller closes it.

        Raises:
            NotFoundError: there is nothing.
            RefusedError: as `parent`; or it is a link, a directory or a special file, or unreadable.
        """
        shown = display_path(path)
        with self.parent(path) as (parent_fd, leaf):
            try:
                # Looked at first, because opening a device can have effects.
                _require_file(os.stat(leaf, dir_fd=parent_fd, follow_symlinks=False).st_mode, shown=shown)
                fd = os.open(leaf, _READ, dir_fd=parent_fd)
            except OSError as err:
                raise error_from_os(err, "cannot open", path=shown) from err
            try:
                _require_file(os.fstat(fd).st_mode, shown=shown)
                return FileSource(fd, shown=shown)
            except BaseException:
                os.close(fd)
                raise

    def walk(self, path: bytes) -> Iterator[Entry | WalkError]:
        """Everything at and below ``path``, by name in byte order, each directory after all that is in it.

        Paths in the results are relative to ``path``. Links are not followed. What cannot be copied (no
        permission, special file, too deep, vanished meanwhile) comes as `WalkError`, without what is below it;
        temporary files and forbidden directories do not come at all. One descriptor per level is open until
        the iterator ends or is closed; one thread at a time.

        Raises:
            NotFoundError, RefusedError: ``path`` itself is missing or out of reach; raised at once.
        """
        entry = self.stat(path)
        if entry is None:
            raise NotFoundError(f"{display_path(path)} does not exist", path=display_path(path))
        return self._walk(path, entry)

    def open_directory(self, path: bytes, *, within: int | None = None) -> int:
        """Open the directory ``path`` for listing; the caller closes the descriptor.

        ``within`` is the open directory that holds it; without, it is looked up from the root.

        Raises:
            NotFoundError, RefusedError, StorageError: as `parent`; or it is no directory, or unreadable.
        """
        shown = display_path(path)
        if within is not None:
            return self._enter(within, path.rpartition(b"/")[2], flags=_LIST, create=False, shown=shown)
        if path:
            with self.parent(path) as (fd, leaf):
                return self._enter(fd, leaf, flags=_LIST, create=False, shown=shown)
        with self._descriptor as fd:
            return self._enter(fd, b".", flags=_LIST, create=False, shown=shown)

    def look(self, path: bytes, *, within: int, relative: bytes) -> Entry | None:
        """What is at ``path``, whose directory is open as ``within``; None when it is out of reach.

        ``relative`` is the path that the entry gets.

        Raises:
            NotFoundError, RefusedError, StorageError: as `stat`; or the path is too long or too deep.
        """
        if len(path) > MAX_PATH or path.count(b"/") >= MAX_DEPTH:
            shown = display_path(path)
            raise StorageError(
                f"{shown}: deeper than {MAX_DEPTH} components or longer than {MAX_PATH} bytes; "
                "copy it from a directory further down",
                path=shown,
            )
        return self._look(within, path.rpartition(b"/")[2], relative, full=path)

    # ---- writing ------------------------------------------------------------------------

    def open_sink(
        self,
        path: bytes,
        *,
        size: int | None,
        source: SourceMark | None = None,
        fsync: Fsync = Fsync.NEVER,
        is_idle: Callable[[], bool] | None = None,
    ) -> FileSink:
        """A sink for the file ``path`` of ``size`` bytes (None: unknown); see there for the rest.

        Raises:
            RefusedError, StorageError: ``path`` is not a legal path, or is the root.
        """
        _require_leaf(path)
        return FileSink(
            lambda: self._open_parent(path, create=True),
            shown=display_path(path),
            size=size,
            source=source,
            fsync=fsync,
            is_idle=is_idle,
            partials=self._partials,
        )

    def has_partial(self, path: bytes) -> bool:
        """Whether a broken copy of the file ``path`` lies beside it that could be continued.

        Raises:
            RefusedError, StorageError: as `parent`; that something on the way is missing is no error.
        """
        try:
            with self.parent(path) as (fd, leaf):
                return has_partial(leaf, dir_fd=fd)
        except NotFoundError:
            return False
        except OSError as err:
            raise error_from_os(err, "cannot look at", path=display_path(path)) from err

    def put_file(self, path: bytes, entry: Entry, content: memoryview, *, parents: Parents) -> None:
        """Make the file ``path`` of what is all there already, in place of any file or link there.

        For small ones, by what costs least: nothing is left for a later try, and another that writes the same file
        at the same time is not asked; the last to finish has the name. It is never synced. As with `FileSink`, nobody
        sees it in part.

        Raises:
            RefusedError: as `parent`; or a directory has that name.
            StorageError: the file system failed.
        """
        try:
            parent_fd, leaf = parents.of(path)
            fd, temporary = parents.create()
            try:
                done = 0
                while done < content.nbytes:
                    done += os.write(fd, content[done:])
                os.fchmod(fd, entry.mode & 0o777)
                set_times(fd, mtime_ns=entry.mtime_ns)
                os.close(os.dup(fd))  # some file systems report a failed write only here
                if not temporary:
                    temporary = parents.give_name(fd, leaf)
                if temporary:
                    os.rename(temporary, leaf, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
            except BaseException:
                if temporary:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=parent_fd)
                raise
            finally:
                os.close(fd)
        except OSError as err:
            raise target_error(err, "cannot write", path=display_path(path)) from err

    def read_file(self, path: bytes, view: memoryview, *, parents: Parents) -> os.stat_result | None:
        """Read all of the regular file ``path`` to the beginning of ``view``.

        None when that has no room for it, or the file has holes worth telling of.

        Returns what the file was, which counts rather than what its name was a moment ago.

        Raises:
            NotFoundError, RefusedError, StorageError: as `open_source`.
            SourceChangedError: it was written to meanwhile.
        """
        parent_fd, leaf = parents.of(path)
        try:
            fd = os.open(leaf, _READ, dir_fd=parent_fd)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    _require_file(status.st_mode, shown=display_path(path))
                size = status.st_size
                if size > view.nbytes or (size >= MIN_HOLE and status.st_blocks * 512 < size):
                    return None
                done = 0
                while done < size and (step := os.readv(fd, [view[done:size]])):
                    done += step
                after = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError as err:
            raise error_from_os(err, "cannot read", path=display_path(path)) from err
        if done < size or (after.st_size, after.st_mtime_ns) != (size, status.st_mtime_ns):
            raise source_changed(display_path(path))
        return status

    def put_directory(self, path: bytes, entry: Entry) -> None:
        """Make the directory ``path`` unless it is there, then set mode and modification time from ``entry``.

        An existing one keeps its setgid and sticky bits, which peers do not decide. Writing into the directory
        afterwards changes its time again: call this when its content is complete.

        Raises:
            RefusedError: as `parent`; or something else has that name.
            StorageError: the file system failed.
        """
        shown = display_path(path)
        with self.parent(path, create=True) as (parent_fd, leaf):
            fd = self._enter(parent_fd, leaf, flags=_LIST, create=True, shown=shown)
            try:
                kept = os.fstat(fd).st_mode & 0o7000
                os.fchmod(fd, kept | (entry.mode & 0o777))
                set_times(fd, mtime_ns=entry.mtime_ns)
            except OSError as err:
                raise target_error(err, "cannot set mode and time of", path=shown) from err
            finally:
                os.close(fd)

    def put_symlink(self, path: bytes, entry: Entry) -> None:
        """Make ``path`` a symbolic link to ``entry.target``, in place of any file or link there.

        Raises:
            RefusedError: as `parent`; or a directory has that name.
            StorageError: the file system failed.
        """
        shown = display_path(path)
        temporary = temporary_name()
        with self.parent(path, create=True) as (fd, leaf):
            try:
                os.symlink(entry.target, temporary, dir_fd=fd)
                try:
                    os.utime(temporary, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=fd, follow_symlinks=False)
                    os.rename(temporary, leaf, src_dir_fd=fd, dst_dir_fd=fd)
                except BaseException:
                    os.unlink(temporary, dir_fd=fd)
                    raise
            except OSError as err:
                raise target_error(err, "cannot make the symbolic link", path=shown) from err

    # ---- end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Let the directory go. Open sources and sinks live on; a sink that has not begun fails. Idempotent."""
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside -------------------------------------------------------------------------

    def _open_parent(self, path: bytes, *, create: bool) -> tuple[int, bytes]:
        *above, leaf = _require_leaf(path)
        try:
            with self._descriptor as root_fd:
                fd = os.open(b".", _PASS, dir_fd=root_fd)
        except OSError as err:
            raise error_from_os(err, "cannot open the root of", path=display_path(path)) from err
        for depth, name in enumerate(above, 1):
            try:
                inner = self._enter(fd, name, flags=_PASS, create=create, shown=display_path(b"/".join(above[:depth])))
            finally:
                os.close(fd)
            fd = inner
        return fd, leaf

    def _enter(self, parent_fd: int, name: bytes, *, flags: int, create: bool, shown: str) -> int:
        """Open the directory ``name``; never a link, never a forbidden one."""
        try:
            try:
                fd = os.open(name, flags, dir_fd=parent_fd)
            except FileNotFoundError:
                if not create:
                    raise
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o777, dir_fd=parent_fd)
                fd = os.open(name, flags, dir_fd=parent_fd)
        except OSError as err:
            if err.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _not_a_directory(parent_fd, name, shown=shown) from err
            raise (target_error if create else error_from_os)(err, "cannot enter", path=shown) from err
        try:
            if self._is_forbidden(os.fstat(fd)):
                raise _out_of_reach(shown)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _look(self, parent_fd: int, name: bytes, path: bytes, *, full: bytes) -> Entry | None:
        """The entry ``name``, whose path is ``full``; None when it is forbidden."""
        try:
            status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            return None if self._is_forbidden(status) else self._describe(parent_fd, name, path, status)
        except OSError as err:
            raise error_from_os(err, "cannot look at", path=display_path(full)) from err

    def _describe(self, parent_fd: int, name: bytes, path: bytes, status: os.stat_result) -> Entry:
        kind = entry_type(status.st_mode)
        if kind is None:
            shown = display_path(path)
            raise RefusedError(
                f"{shown} is a {special_name(status.st_mode)}; only files, directories and links are copied", path=shown
            )
        return Entry(
            path,
            kind,
            stat.S_IMODE(status.st_mode),
            status.st_mtime_ns,
            status.st_size if kind is EntryType.FILE else 0,
            os.readlink(name, dir_fd=parent_fd) if kind is EntryType.SYMLINK else b"",
        )

    def _walk(self, base: bytes, top: Entry) -> Iterator[Entry | WalkError]:
        top = Entry(b"", top.type, top.mode, top.mtime_ns, top.size, top.target)
        if top.type is not EntryType.DIRECTORY:
            yield top
            return
        levels: list[_Level] = []
        try:
            try:
                levels.append(self._open_level(self.open_directory(base), b"", shown=display_path(base)))
            except AmstError as err:
                yield WalkError(b"", err)
            while levels:
                level = levels[-1]
                name = next(level.names, None)
                if name is None:
                    levels.pop()
                    os.close(level.fd)
                    yield level.entry
                    continue
                path = join_path(level.entry.path, name)
                try:
                    found = self._step(level.fd, path, base=base)
                except AmstError as err:
                    yield WalkError(path, err)
                    continue
                if isinstance(found, _Level):
                    levels.append(found)
                elif found is not None:
                    yield found
        finally:
            for level in levels:
                os.close(level.fd)

    def _step(self, parent_fd: int, path: bytes, *, base: bytes) -> Entry | _Level | None:
        full = join_path(base, path)
        entry = self.look(full, within=parent_fd, relative=path)
        if entry is None or entry.type is not EntryType.DIRECTORY:
            return entry
        return self._open_level(self.open_directory(full, within=parent_fd), path, shown=display_path(full))

    def _open_level(self, fd: int, path: bytes, *, shown: str) -> _Level:
        try:
            names = sorted(os.fsencode(found) for found in os.listdir(fd))
            entry = self._describe(fd, b".", path, os.fstat(fd))
        except OSError as err:
            os.close(fd)
            raise error_from_os(err, "cannot list", path=shown) from err
        return _Level(fd, entry, iter([found for found in names if not found.startswith(HIDDEN_PREFIX)]))

    def _is_forbidden(self, status: os.stat_result) -> bool:
        return bool(self._forbidden) and (status.st_dev, status.st_ino) in self._forbidden

    def _lies_in_forbidden(self, fd: int) -> bool:
        """Whether the directory ``fd`` or one above it is forbidden."""
        seen: tuple[int, int] | None = None
        fd = os.dup(fd)
        try:
            while True:
                status = os.fstat(fd)
                if self._is_forbidden(status):
                    return True
                if (status.st_dev, status.st_ino) == seen:
                    return False
                seen = status.st_dev, status.st_ino
                try:
                    above = os.open(b"..", _PASS, dir_fd=fd)
                except PermissionError:
                    return False  # what is ours to forbid, we may enter
                os.close(fd)
                fd = above
        finally:
            os.close(fd)


class Parents:
    """The directories that hold one path after another; the last one stays open for the next path, until `close`.

    It stays the same directory, whatever happens to its name. One thread at a time. ``create`` makes what is missing
    on the way, and cleans up what broken copies left.
    """

    def __init__(self, root: Root, *, create: bool = False) -> None:
        self._root = root
        self._create = create
        self._directory = b""
        self._fd = -1
        self._can_be_unnamed = os.path.isdir("/proc/self/fd")
        self._stem = HIDDEN_PREFIX + secrets.token_hex(8).encode()
        self._count = 0

    def of(self, path: bytes) -> tuple[int, bytes]:
        """The directory that holds ``path``, as a descriptor that lasts until the next call, and the last component.

        Raises:
            RefusedError, NotFoundError, StorageError: as `Root.parent`.
        """
        directory, _, leaf = path.rpartition(b"/")
        if self._fd >= 0 and directory == self._directory and is_legal_name(leaf):
            return self._fd, leaf
        self.close()
        self._fd, leaf = self._root._open_parent(path, create=self._create)
        self._directory = directory
        if self._create:
            status = os.fstat(self._fd)
            self._root._partials.sweep(self._fd, (status.st_dev, status.st_ino))
        return self._fd, leaf

    def create(self) -> tuple[int, bytes]:
        """An empty file in the last directory, open for writing, and its temporary name.

        It has no name (empty) where the file system can do that: nothing is left of it if the process is killed.
        """
        if self._can_be_unnamed:
            try:
                return os.open(b".", _UNNAMED, 0o600, dir_fd=self._fd), b""
            except OSError as err:
                if err.errno not in _NO_UNNAMED:
                    raise
                self._can_be_unnamed = False
        name = self._temporary_name()
        return os.open(name, _CREATE, 0o600, dir_fd=self._fd), name

    def give_name(self, fd: int, leaf: bytes) -> bytes:
        """Name an unnamed file ``leaf``, if nothing has that name; else it gets the temporary one that is returned."""
        source = b"/proc/self/fd/%d" % fd
        try:
            os.link(source, leaf, dst_dir_fd=self._fd)
            return b""
        except FileExistsError:
            pass
        name = self._temporary_name()
        os.link(source, name, dst_dir_fd=self._fd)
        return name

    def _temporary_name(self) -> bytes:
        """As `partial.temporary_name`, for less: a fresh one each time."""
        self._count += 1
        return b"%s%x%s" % (self._stem, self._count, PART)

    def close(self) -> None:
        """Let the last one go. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_leaf(path: bytes) -> tuple[bytes, ...]:
    parts = split_path(path)
    if not parts:
        raise RefusedError("the path names the root itself; name something below it", path=display_path(path))
    return parts


def _require_file(st_mode: int, *, shown: str) -> None:
    kind = entry_type(st_mode)
    if kind is not EntryType.FILE:
        what = f"a {special_name(st_mode)}" if kind is None else f"a {kind.value}"
        raise RefusedError(f"{shown} is {what}, not a regular file", path=shown)


def _not_a_directory(parent_fd: int, name: bytes, *, shown: str) -> RefusedError:
    with contextlib.suppress(OSError):  # it may be gone again; then the plainer message serves
        if stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
            return RefusedError(
                f"{shown} is a symbolic link, and links below the root are not followed; name the real path", path=shown
            )
    return RefusedError(f"{shown} is not a directory", path=shown)


def _out_of_reach(shown: str) -> RefusedError:
    return RefusedError(f"{shown} is kept by AMST for itself and out of reach", path=shown)
