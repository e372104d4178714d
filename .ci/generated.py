"Fails where a generated file is not what its source says: modules, clean notebooks, README.md. Whether changes are committed does not matter."

import subprocess, sys
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def contents():
    "Path → hash of its content, for every file that is generated"
    files = [*ROOT.glob('autounet_nb/**/*.py'), *ROOT.glob('nbs/**/*.ipynb'), ROOT / 'README.md']
    return {str(f.relative_to(ROOT)): blake2b(f.read_bytes()).hexdigest() for f in files}


def main():
    before = contents()
    for command in (['nbdev-export'], ['nbdev-clean'], ['python', '.ci/readme.py']):
        subprocess.run([ROOT / '.venv' / 'bin' / command[0], *command[1:]], cwd=ROOT, check=True)
    after = contents()
    changed = sorted(f for f in {*before, *after} if before.get(f) != after.get(f))
    if changed:
        print('These files were not what their sources say. They are now; commit them:', *changed, sep='\n  ')
    sys.exit(bool(changed))


if __name__ == '__main__':
    main()
