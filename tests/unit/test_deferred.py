"""A deferred module costs nothing until it is used, and is then the module itself. Each in a process of its own: modules are the process's."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


DEFER = "import sys; from edgefleet_shared.deferred import defer; defer('urllib.request')\n"


def test_importing_a_deferred_module_loads_nothing() -> None:
    said = run(
        DEFER + "import urllib.request, urllib.parse; print('http.client' in sys.modules, 'tempfile' in sys.modules)"
    )
    assert said == "False False"


@pytest.mark.parametrize(
    "use",
    [
        "import urllib.request; print(urllib.request.Request('http://a/b').host)",
        "from urllib.request import Request; print(Request('http://a/b').host)",
        "from urllib import request; print(request.Request('http://a/b').host)",
    ],
)
def test_it_is_the_module_itself_once_it_is_used(use: str) -> None:
    assert run(DEFER + use) == "a"


def test_a_name_that_the_module_lacks_is_missing() -> None:
    assert (
        run(DEFER + "import urllib.request; print(hasattr(urllib.request, 'nothing'), urllib.request.urlopen.__name__)")
        == "False urlopen"
    )


def test_threads_that_use_it_at_once_all_see_the_whole_module() -> None:
    program = DEFER + (
        "import threading, urllib.request\n"
        "start, seen = threading.Barrier(8), []\n"
        "def use():\n"
        "    start.wait()\n"
        "    seen.append(urllib.request.Request('http://a/b').host + urllib.request.getproxies.__name__)\n"
        "threads = [threading.Thread(target=use) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(seen), set(seen))"
    )
    assert run(program) == "8 {'agetproxies_environment'}"


def test_a_module_that_is_there_already_stays() -> None:
    assert (
        run("import urllib.request as first\n" + DEFER + "import urllib.request; print(urllib.request is first)")
        == "True"
    )


def test_a_package_that_imports_the_module_itself_finds_it_deferred() -> None:
    program = (
        "from edgefleet_shared.deferred import defer\n"
        "defer('msgspec.inspect')\n"
        "import msgspec\n"
        "print('Metadata' in vars(msgspec.inspect), msgspec.inspect.type_info(int), msgspec.json.schema(int))"
    )
    assert run(program) == "False IntType(gt=None, ge=None, lt=None, le=None, multiple_of=None) {'type': 'integer'}"


@pytest.mark.parametrize(
    "name", ["no_such_module", "no_such_package.module", "msgspec.nothing", "json.decoder.nothing"]
)
def test_what_is_not_there_is_refused(name: str) -> None:
    assert (
        run(
            f"from edgefleet_shared.deferred import defer\ntry: defer({name!r})\nexcept ModuleNotFoundError as e: print(e.name)"
        )
        == name
    )


def test_a_library_does_without_what_it_is_not_to_have() -> None:
    program = (
        "from edgefleet_shared.deferred import without\n"
        "without('typing_extensions')\n"
        "import msgspec, sys\n"
        "class Wire(msgspec.Struct):\n    a: int | None = None\n    b: tuple[str, ...] = ()\n"
        'print(msgspec.json.decode(b\'{"a":1,"b":["x"]}\', type=Wire), \'inspect\' in sys.modules)'
    )
    assert run(program) == "Wire(a=1, b=('x',)) False"


def test_what_is_there_already_is_not_taken_away() -> None:
    program = (
        "import typing_extensions\nfrom edgefleet_shared.deferred import without\n"
        "without('typing_extensions')\nimport typing_extensions as t; print(t is typing_extensions)"
    )
    assert run(program) == "True"


STAND_IN = "import sys; from edgefleet_shared.deferred import stand_in\n"


def test_a_library_gets_a_class_that_stands_in_and_the_module_comes_when_it_is_wanted() -> None:
    program = STAND_IN + (
        "with stand_in('decimal', 'Decimal'):\n    import msgspec\n"
        "print('_decimal' in sys.modules, msgspec.json.decode(b'[1.5]'), end=' ')\n"
        "from decimal import Decimal; print(Decimal('1.50'))"
    )
    assert run(program) == "False [1.5] 1.50"


def test_nothing_stands_in_for_a_module_that_is_there_already() -> None:
    program = STAND_IN + (
        "import decimal\nwith stand_in('decimal', 'Decimal'):\n    import msgspec\n"
        "print(msgspec.json.encode(decimal.Decimal('1.50')), sys.modules['decimal'] is decimal)"
    )
    assert run(program) == "b'\"1.50\"' True"


def test_a_stand_in_goes_where_the_import_fails() -> None:
    program = STAND_IN + (
        "try:\n    with stand_in('decimal', 'Decimal'):\n        import no_such_module\n"
        "except ImportError: print('decimal' in sys.modules)"
    )
    assert run(program) == "False"


def test_the_resident_agent_carries_nothing_that_it_does_not_use() -> None:
    heavy = (
        "'http.client', 'email.message', 'tempfile', 'lzma', 'random', 'inspect', 'ast', 'click', "
        "'decimal', 'numbers', 'pydantic', 'cryptography', 'numpy', 'tuf'"
    )
    # Without a state folder it ends, but only after all has been imported.
    program = (
        "import sys; sys.argv = ['agent', '/nonexistent']\n"
        "from edgefleet_agent import resident\n"
        "try: resident.main()\nexcept SystemExit: pass\n"
        f"print('edgefleet_agent.app' in sys.modules, [m for m in ({heavy}) if m in sys.modules],\n"
        "      [m for m in ('ipaddress', 'locale', 'base64', 'traceback') if type(sys.modules[m]).__name__ != '_Deferred'])"
    )
    assert run(program) == "True [] []"
