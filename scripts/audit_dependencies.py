"""Runs pip-audit on all pinned versions (`make audit`). A known vulnerability is an error; a missing answer is not."""

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def audit(constraints: Path) -> list[str]:
    """One line per known vulnerability of the packages in a file; prints how many packages the index knows."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    finished = subprocess.run(
        [*command, "--format", "json", "--requirement", constraints], capture_output=True, text=True
    )
    try:
        packages = json.loads(finished.stdout)["dependencies"]
    except ValueError:
        print(f"{constraints.name}: no answer ({finished.stderr.strip().splitlines()[-1][:200]})")
        return []
    known = [package for package in packages if "vulns" in package]
    print(f"{constraints.name}: {len(known)} of {len(packages)} packages are known to the index")
    return [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in known
        for found in package["vulns"]
    ]


if __name__ == "__main__":
    sys.exit("\n".join(line for file in sorted((ROOT / "constraints").glob("*.txt")) for line in audit(file)) or 0)
