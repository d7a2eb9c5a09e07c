"""``tests.job``, with which `make test-gpu GPU=rocm` runs MORI on real devices: here on simulated ones."""

import pytest

from tests.rocm import mori_jobs, simulated

COMMAND = (simulated.PYTHON, "-m", "tests.job", "--platform", "rocm")


def run(devices, *arguments):
    libraries = simulated.environment(devices)["LD_LIBRARY_PATH"]
    environment = mori_jobs.ENVIRONMENT | {"LD_LIBRARY_PATH": f"{libraries}:{simulated.MORI}"}
    process = simulated.start(*COMMAND, *arguments, devices=devices, **environment)
    out, err = simulated.finish(process, 300)
    return process.returncode, out + err


def test_a_job_for_each_number_of_devices():
    code, said = run(2, "tests/contract/test_exchange.py", "-k", "mori and rows_and_sums and (1-10 or 2-8)")
    assert code == 0, said
    assert said.count("1 passed, 1 skipped") == 2, said
    assert "1 processes, one GPU each" in said
    assert "2 processes, one GPU each" in said


@pytest.mark.parametrize(
    ("index", "shown"), [(0, "assert 0 != 0"), (1, "process 1 ended with code 1; it said:")]
)
def test_a_failure_of_any_process_is_the_jobs(index, shown, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(f"import jax\n\ndef test_it():\n    assert jax.process_index() != {index}\n")
    code, said = run(
        2, "--processes", "2", "-c", "/dev/null", "--rootdir", ".", "-p", "tests.conftest", str(file)
    )
    assert code == 1, said
    assert shown in said
