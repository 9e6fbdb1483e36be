# third: sees a disk come and go.
. /library.sh

check "the file system of the first guest" e2fsck -fn /dev/sda
check "a disk is added" within 60 test -b /dev/sdb
check "and removed" within 60 test ! -b /dev/sdb
check "the first disk goes on" dd if=/dev/sda of=/dev/null bs=64k count=100 iflag=direct
[ $failures = 0 ]
