"""ALORA_TEST_REQUIRE_ALL turns every kind of skip into a failure, and nothing else."""

from __future__ import annotations

import pytest

import require_all

pytest_plugins = ["pytester"]

SKIPPING_MODULES = {
    "test_call": "import pytest\ndef test_a(): pytest.skip('needs a moon')",
    "test_mark": "import pytest\n@pytest.mark.skipif(True, reason='needs a moon')\ndef test_a(): pass",
    "test_fixture": ("import pytest\n@pytest.fixture\ndef moon(): pytest.skip('needs a moon')\ndef test_a(moon): pass"),
}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project that uses the plugin and nothing of this repository's configuration."""
    pytester.makeconftest("pytest_plugins = ['require_all']")
    monkeypatch.delenv(require_all.VARIABLE, raising=False)
    return pytester


def test_skips_pass_and_are_listed_with_their_reason_by_default(project: pytest.Pytester) -> None:
    project.makepyfile(**SKIPPING_MODULES)
    result = project.runpytest_inprocess("-rs", "-p", "no:asyncio")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED*needs a moon*"])
    assert result.ret == pytest.ExitCode.OK


def test_every_way_to_skip_a_test_fails_when_all_are_required(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(require_all.VARIABLE, "1")
    project.makepyfile(**SKIPPING_MODULES)
    result = project.runpytest_inprocess("-p", "no:asyncio")
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 3
    assert "skipped" not in outcomes
    result.stdout.fnmatch_lines(["*needs a moon*", f"*{require_all.VARIABLE}=1 forbids skipping*"])


def test_a_module_that_skips_itself_fails_when_all_are_required(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(require_all.VARIABLE, "1")
    project.makepyfile("import pytest\npytest.importorskip('no_such_module_of_ours')\ndef test_a(): pass")
    result = project.runpytest_inprocess("-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{require_all.VARIABLE}=1 forbids skipping*"])


def test_an_expected_failure_is_no_skip(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(require_all.VARIABLE, "1")
    project.makepyfile("import pytest\n@pytest.mark.xfail(reason='known')\ndef test_a(): assert False")
    project.runpytest_inprocess("-p", "no:asyncio").assert_outcomes(xfailed=1)


def test_a_gpu_is_not_required(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(require_all.VARIABLE, "1")
    monkeypatch.setattr(require_all.torch.cuda, "is_available", lambda: False)
    project.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_a(): assert False")
    result = project.runpytest_inprocess("-rs", "-p", "no:asyncio")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*torch sees no CUDA device*"])


def test_what_needs_a_gpu_runs_where_there_is_one(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require_all.torch.cuda, "is_available", lambda: True)
    project.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_a(): assert False")
    project.runpytest_inprocess("-p", "no:asyncio").assert_outcomes(failed=1)


def test_where_there_is_a_gpu_its_tests_may_not_skip_themselves(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(require_all.VARIABLE, "1")
    monkeypatch.setattr(require_all.torch.cuda, "is_available", lambda: True)
    project.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_a(): pytest.skip('needs a moon')")
    project.runpytest_inprocess("-p", "no:asyncio").assert_outcomes(failed=1)
