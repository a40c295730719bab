#!/bin/sh
# Build wheel and sdist of the commit into dist/, and run the demo from the wheel in an empty environment: scripts/release.sh PYTHON
set -eu
python=$1
cd "$(dirname "$0")/.."
if [ -n "$(git status --porcelain)" ]; then
    echo "A release has the files of a commit. Commit or remove these first:" >&2
    git status --short >&2
    exit 1
fi
lock=$(pwd)/requirements.lock
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf dist
"$python" -m hatchling build --target sdist --target wheel
wheel=$(ls "$(pwd)"/dist/*.whl)

echo "The wheel that is built from the sdist has the same files:"
mkdir "$work/sdist"
tar -xzf dist/*.tar.gz -C "$work/sdist" --strip-components 1
(cd "$work/sdist" && "$python" -m hatchling build --target wheel --directory "$work/again" > /dev/null 2>&1)
"$python" - "$wheel" "$work"/again/*.whl << 'END'
import sys, zipfile
first, second = ({one.filename: one.CRC for one in zipfile.ZipFile(path).infolist()} for path in sys.argv[1:])
assert first == second, sorted(set(first.items()) ^ set(second.items()))
print(f"{len(first)} files")
END

echo "The demo from the wheel, in an empty environment and folder:"
"$python" -m venv --without-pip "$work/venv"  # the pip of this environment installs into it
"$python" -m pip --python "$work/venv" install --quiet --disable-pip-version-check --no-compile --constraint "$lock" "$wheel"
mkdir "$work/empty"
cd "$work/empty"
unset PYTHONPATH
PATH=$work/venv/bin:$PATH
prostate-seg -m stage=fetch,preprocess,prepare,train,evaluate,report experiment=quickstart
prostate-seg stage=register register.promote=true register.min_test_patients=8 register.reason='release check' experiment=quickstart
prostate-seg stage=predict predict.model=models:/prostate_seg@champion predict.input=data/images/ph001_1.nii.gz
for file in report/report.html predictions/masks/ph001_1.nii.gz; do
    [ -s "$file" ] || { echo "$file was not written" >&2; exit 1; }
done
cd - > /dev/null
echo "dist/ is ready:"
ls -l dist
version=$(basename "$wheel" | cut -d- -f2)
grep -q "^## \[\?$version\]\? - 20" CHANGELOG.md || echo "Before it is published: CHANGELOG.md needs the heading '## $version - DATE' instead of 'Unreleased'."
