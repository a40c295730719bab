#!/bin/sh
# Install the post-commit hook: a commit that changes dvc.lock is recorded as a tag of the runs whose results it contains.
# Run it in the folder of the project, which may be a subfolder of a git repository; each project has its own line in the hook.
set -eu
python=$1
hook=$(git rev-parse --git-path hooks)/post-commit
project=./$(git rev-parse --show-prefix)
if [ -e "$hook" ] && ! grep -q "prostate_seg stage=link" "$hook"; then
    echo "a post-commit hook exists already: $hook; add to it: $python -m prostate_seg stage=link" >&2
    exit 1
fi
mkdir -p "$(dirname "$hook")"
others=$(grep "prostate_seg stage=link" "$hook" 2>/dev/null | grep -vF "cd \"$project\"" || true)
cat > "$hook" <<END
#!/bin/sh
changed() { [ -n "\$(git diff-tree --no-commit-id --name-only -r --root HEAD -- "\$1")" ]; }
linked() { unset \$(git rev-parse --local-env-vars) && "\$@"; }
$others
if changed "${project}dvc.lock"; then (cd "$project" && linked $python -m prostate_seg stage=link); fi
END
chmod +x "$hook"
echo "installed $hook"
