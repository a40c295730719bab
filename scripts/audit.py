"""Check the locked packages for known vulnerabilities with pip-audit: `make audit`.

pip-audit is installed into a temporary environment. It also reports "no known vulnerabilities" if the database cannot be
reached, so its report is checked package by package.

Exit codes: 0 all packages were checked and none has a known vulnerability; 1 some have; 3 some could not be checked.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "requirements.lock"
PIP_AUDIT = "pip-audit==2.10.1"
SERVICES = ("pypi", "osv")
"""Both provide the Python Packaging Advisory Database; the second is used if the first does not answer."""
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3

Report = dict[str, Any]


def main() -> int:
    """Install pip-audit into a temporary environment and check the lock."""
    with tempfile.TemporaryDirectory(prefix="audit-") as name:
        venv.create(name, with_pip=True)
        program = Path(name) / "bin" / "pip-audit"
        install = [Path(name) / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*install, PIP_AUDIT], check=False).returncode != 0:
            print(f"NOT CHECKED: {PIP_AUDIT} could not be installed")
            return UNKNOWN
        return judge_with(program, LOCK)


def judge_with(program: Path, lock: Path) -> int:
    """Try the services until one answers for every package; print the result and return the exit code."""
    code, text = UNKNOWN, "no service answered"
    for service in SERVICES:
        code, text = judge(look_up(program, lock, service=service))
        if code != UNKNOWN:
            break
    print(text)
    if code == UNKNOWN:
        print(f"Run `make audit` on a machine that reaches the services of pip-audit ({', '.join(SERVICES)}).")
    return code


def look_up(program: Path, lock: Path, *, service: str) -> Report:
    """Return pip-audit's report; an empty one if the service did not answer."""
    options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=15"]
    command = [program, "--requirement", lock, f"--vulnerability-service={service}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def judge(report: Report) -> tuple[int, str]:
    """Return the exit code and the message for a report."""
    packages = report.get("dependencies", [])
    vulnerable = [package for package in packages if package.get("vulns")]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if vulnerable:
        lines = [f"{one['name']} {one['version']}: {_known(one)}" for one in vulnerable]
        return VULNERABLE, "\n".join(
            [f"{len(vulnerable)} of {len(packages)} packages are known to be vulnerable", *lines]
        )
    if not packages:
        return UNKNOWN, "NOT CHECKED: no database of vulnerabilities answered"
    if unknown:
        return UNKNOWN, f"NOT CHECKED: {len(unknown)} of {len(packages)} packages, such as {unknown[0]}"
    return CLEAN, f"{len(packages)} packages looked up, none is known to be vulnerable"


def _known(package: Report) -> str:
    fixes = {version for vulnerability in package["vulns"] for version in vulnerability.get("fix_versions", [])}
    names = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
    return f"{names}; fixed in {', '.join(sorted(fixes)) or 'no release yet'}"


if __name__ == "__main__":
    sys.exit(main())
