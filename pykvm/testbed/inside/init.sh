#!/busybox sh
# First process of the emulated host: from the initramfs to the root disk.
b=/busybox
$b mkdir -p /dev /proc /root
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
	$b insmod $module || echo "testbed: cannot load $module"
done
# The root disk is the second one. Bochs keeps what is written to it apart from the image and
# drops it at the end, so the file system can be mounted for writing.
tries=0
while [ ! -b /dev/sdb ] && [ $tries -lt 100 ]; do
	$b usleep 20000
	tries=$((tries + 1))
done
$b mount -t ext4 -o noatime /dev/sdb /root || exec $b sh
$b mount --move /dev /root/dev
$b cp /agent.py /root/usr/sbin/testbed-agent
exec $b switch_root /root /usr/bin/python3 -I /usr/sbin/testbed-agent
