# xenstored: dies under a disk that is in use, and comes back having forgotten everything.
. /library.sh

configure << END
backstores: { disk: { type: ram, size: 32MiB } }
targets: { $TARGET: { luns: { 0: disk } } }
xen: { enabled: true }
END
serve
need "a disk" targetctl xen attach 0 $TARGET:0,0:0:0:0
need "the guest finds it" within 20 test -b /dev/sda
dd if=/dev/urandom of=/tmp/random bs=1M count=16 2> /dev/null
# turns: processor time of the daemon, in hundredths of a second
turns() { awk '{ print $14 + $15 }' /proc/$server/stat; }

kill -9 "$(cat /run/xenstored.pid)"
need "the daemon notices that xenstored has died" within 30 grep "has lost xenstored" /tmp/target.log
check "the disk is written without it" dd if=/tmp/random of=/dev/sda bs=1M oflag=direct
check "and read" sh -c 'dd if=/dev/sda bs=1M count=16 iflag=direct 2> /dev/null | cmp - /tmp/random'
before=$(turns)
sleep 20
after=$(turns)
check "it waits without spinning: 20 s cost it $((after - before)) hundredths" test $((after - before)) -lt 200
check "its status says what it waits for" sh -c 'targetctl list xen | grep -i xenstore'
check "it says so once" test "$(grep -c "waits, and tries again" /tmp/target.log)" -le 1

rm -f /run/xenstored.pid
xenstored --pid-file /run/xenstored.pid
xen-init-dom0 > /dev/null
check "it follows the next xenstored" within 30 sh -c '[ "$(grep -c "follows xenstore" /tmp/target.log)" = 2 ]'
check "which has forgotten the disk, and the log says what to do" within 10 grep "its nodes were lost" /tmp/target.log
check "the disk goes on" sh -c 'dd if=/dev/sda bs=1M count=16 iflag=direct 2> /dev/null | cmp - /tmp/random'
check "the daemon lives" kill -0 $server
check "the kernel has nothing to complain about" sh -c '
    ! dmesg | grep -iE "illegal rqid|disabling device|I/O error|BUG:|WARNING:"'
[ $failures = 0 ] || report
finish
