# before: starts the daemon of the script loopback before there is a xenstored.
. /library.sh
configure << END
backstores:
  first: { type: file, path: /dev/shm/disk0, size: 96MiB, buffered: true }
  second: { type: ram, size: 32MiB }
targets:
  $TARGET: { luns: { 0: first, 1: second } }
vhost-user-scsi:
  - { socket: /run/targetd/vm.sock, targets: { 0: $TARGET } }
xen: { enabled: true }
END
serve
echo $server > /run/server
within 60 grep -q "waits, and tries again" /tmp/target.log
