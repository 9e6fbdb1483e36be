# commands: runs what dom0 writes to the console, line by line.
. /library.sh

stty -echo < /dev/hvc0
[ ! -e /prepare ] || . /prepare
echo "takes commands"
while read -r line; do
    [ "$line" != end ] || break
    eval "$line"
done < /dev/hvc0
