#!/bin/bash
# As rustfs, by rclone: an S3 server with one pair of keys and the folder of RUSTFS_VOLUMES.
set -eu
HOME=/tmp rclone serve s3 --addr 127.0.0.1:9001 --auth-key "$RUSTFS_ACCESS_KEY,$RUSTFS_SECRET_KEY" "$RUSTFS_VOLUMES" &
nginx -e /dev/stderr &
wait -n
