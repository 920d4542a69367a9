"""How much memory there is to be had, as the system says."""

from pathlib import Path

import pytest

from camri_tune import memory
from camri_tune.memory import free_memory

V2, V1 = memory._GROUPS
MACHINE = {"/proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   4000 kB\nSwapFree:  0 kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 4_096_000),
        ({**MACHINE, V2[0]: "3000000\n", V2[1]: "1000000\n"}, 2_000_000),
        ({**MACHINE, V2[0]: "9000000\n", V2[1]: "1000000\n"}, 4_096_000),
        ({**MACHINE, V2[0]: "max\n", V2[1]: "1000000\n"}, 4_096_000),
        ({V1[0]: "5000\n", V1[1]: "6000\n"}, 0),
        ({V2[0]: "9000\n", V2[1]: "8000\n", V2[2]: "anon 500\nfile 7000\ninactive_file 6000\n"}, 7000),
        ({V1[0]: "9000\n", V1[1]: "8000\n", V1[2]: "inactive_file 1\ntotal_inactive_file 6000\n"}, 7000),
        ({V1[0]: "5000\n"}, None),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    files: dict[str, str], free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_read", files.get)
    assert free_memory() == free


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system does not say")
def test_this_machine_has_some() -> None:
    free = free_memory()
    assert free is not None
    assert free > 0
