#!/bin/sh
# Create the project demo/ (code, data, settings, git, DVC, runs) and run the pipeline in it: scripts/demo.sh PYTHON
set -eu
PATH=$(dirname "$1"):$PATH
export PATH
cd "$(dirname "$0")/.."

has_git() { command -v git > /dev/null; }
commit() { if has_git; then git -c user.name=demo -c user.email=demo@localhost commit --quiet --message "$1" || true; fi; }
add() { if has_git; then git add "$@"; fi; }

if [ -d demo/.dvc ]; then
    echo "demo/ exists: continuing with it (make clean removes it)"
    cd demo
else
    mkdir -p demo
    tar --exclude=__pycache__ -cf - configs prostate_seg scripts dvc.yaml .dvc/config .dvc/.gitignore .dvcignore .gitignore |
        tar -xf - -C demo
    cd demo
    if has_git; then git init --quiet; else printf '[core]\n    no_scm = true\n' > .dvc/config.local; fi
    add --all
    commit "The code"
fi
if [ ! -f data.dvc ] || [ ! -f params.yaml ]; then
    python -m prostate_seg stage=fetch experiment=quickstart
    dvc add --quiet data
    python -m prostate_seg stage=export experiment=quickstart
    add data.dvc params.yaml
    commit "Data and settings"
fi
dvc repro
add dvc.lock
commit "Results"
if has_git; then
    python -m prostate_seg stage=link > /dev/null ||
        echo "The runs are not linked to their commit yet: cd demo && python -m prostate_seg stage=link"
fi
echo
echo "Report: demo/report/report.html"
echo "Tables, masks and overlays: demo/evaluation"
echo "Runs in MLflow: make ui"
echo "Next: register the networks as a model, and segment an image, a folder or a"
echo "DICOM series (docs/tutorial.md):"
echo "  source .venv/bin/activate && cd demo"
echo "  python -m prostate_seg stage=register register.promote=true \\"
echo "    register.min_test_patients=8 register.reason='first of its kind'"
echo "  python -m prostate_seg stage=predict predict.input=SERIES \\"
echo "    predict.model=models:/prostate_seg@champion"
echo "Other experiments in demo/:"
if has_git; then
    echo "  dvc exp run -S experiment=quickstart -S train.learning_rate=1e-3"
    echo "  dvc exp show --only-changed"
else
    echo "  python -m prostate_seg stage=export experiment=quickstart train.learning_rate=1e-3"
    echo "  dvc repro"
    echo "Without git there are no commits and no experiments (dvc exp); everything"
    echo "else is recorded."
fi
