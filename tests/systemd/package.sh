# Checks of installation, upgrade, removal and purge of the Debian package; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

enables_and_starts_only_the_service() {
    is handout.service ActiveState active
    is handout.service UnitFileState enabled
    is handout.socket ActiveState inactive
    is handout.socket UnitFileState disabled
    ask 127.0.0.1 6789 | is_time
    ask_udp 127.0.0.1 6789 | is_time
    ask 127.0.0.1 5566 | jq -er .filedata | base64 -d | cmp - /etc/handout/picture.jpg
}

keeps_the_configuration_and_every_connection_during_an_upgrade() {
    systemctl --quiet enable handout.socket
    systemctl start handout.socket handout.service
    local before
    before=$(pid)
    echo '# mine' >>"$CONFIG"
    under_load dpkg --force-confold -i /root/newer.deb
    is handout.service ActiveState active
    [ "$(pid)" -ne "$before" ]
    grep -qx '# mine' "$CONFIG"
    grep -qx '# newer' "$CONFIG.dpkg-dist"
    is handout.socket UnitFileState enabled
    sockets_are_inherited 6789
}

keeps_the_configuration_on_removal() {
    systemctl start handout.service
    dpkg -r handout
    is handout.service ActiveState inactive
    refused nc -z 127.0.0.1 6789
    [ ! -e /usr/lib/systemd/system/handout.service ] && [ ! -e /usr/bin/handout ]
    [ -e "$CONFIG" ]
    [ -L /var/lib/handout ] && [ -d /var/lib/private/handout ]
}

leaves_nothing_after_a_purge() {
    dpkg -P handout
    [ ! -e "$CONFIG" ]
    # Files of the operator remain.
    rm -f /etc/handout/password /etc/handout/other.jpg
    [ ! -e /etc/handout ] || rmdir /etc/handout
    local left
    left=$(find /etc /usr /var -xdev -name '*handout*' -not -path '/var/log/*')
    [ -z "$left" ] || { echo "$left"; return 1; }
    [ ! -e /run/handout ]
}
