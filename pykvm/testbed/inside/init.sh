#!/busybox sh
# First process of the emulated host: from the initramfs to the root disk.
b=/busybox
$b mkdir -p /dev /sys /root
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
	$b insmod $module || echo "testbed: cannot load $module"
done
# The root disk is the second one of the first channel; which name it gets depends on which channel
# answers first. Bochs keeps what is written to it apart from the image and drops it at the end, so
# the file system can be mounted for writing.
$b mount -t sysfs sysfs /sys
tries=0
root=
while [ ! "$root" ] && [ $tries -lt 500 ]; do
	$b usleep 20000
	tries=$((tries + 1))
	for disk in /sys/block/sd*; do
		case "$($b readlink -f $disk/device)" in */0:0:1:0) root=${disk##*/} ;; esac
	done
done
$b umount /sys
$b mount -t ext4 -o noatime /dev/$root /root || exec $b sh
$b mount --move /dev /root/dev
$b cp /agent.py /root/usr/sbin/testbed-agent
exec $b switch_root /root /usr/bin/python3 -I /usr/sbin/testbed-agent
