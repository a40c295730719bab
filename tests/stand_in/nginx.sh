#!/bin/sh
# As nginx-unprivileged: substitutes variables of the environment in templates, and replaces itself by nginx.
set -eu
names=$(env | sed -n 's/^\([A-Z_]*\)=.*/${\1}/p' | tr '\n' ' ')
for template in /etc/nginx/templates/*.template; do
    envsubst "$names" < "$template" > "/etc/nginx/conf.d/$(basename "$template" .template)"
done
exec nginx -e /dev/stderr
