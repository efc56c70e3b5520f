# Checks of services and mirrors under the shipped unit; see run.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

follows_the_time_zone_of_the_system() {
    # Zones that only this system has, because the program contains a copy of the database.
    mkdir -p /usr/share/zoneinfo/Test
    cp /usr/share/zoneinfo/America/Lima /usr/share/zoneinfo/Test/Here
    cp /usr/share/zoneinfo/Asia/Shanghai /usr/share/zoneinfo/Test/There
    cat >"$CONFIG" <<END
[time.here]
listen = ["127.0.0.1:6789"]
format = "%Z"
[time.there]
listen = ["127.0.0.1:6790"]
format = "%Z"
timezone = "Test/There"
END
    ln -sf /usr/share/zoneinfo/Test/Here /etc/localtime
    systemctl start handout
    local here there
    here=$(ask 127.0.0.1 6789) there=$(ask 127.0.0.1 6790)
    ln -sf /usr/share/zoneinfo/Etc/UTC /etc/localtime
    echo "$here $there"
    [ "$here $there" = "-05 CST" ]
}

# Asks the kernel outside of the sandbox.
clock_is_synchronized() {
    python3 -c '
import ctypes
timex = ctypes.create_string_buffer(1024)
state = ctypes.CDLL(None).adjtimex(timex)
status = int.from_bytes(timex[40:44], "little")
print("true" if state != 5 and not status & 0x40 else "false")'
}

configure_clocks() {
    cat >"$CONFIG" <<END
[time.json]
listen = ["127.0.0.1:6789"]
format = "json"
[time.nist]
listen = ["127.0.0.1:6790"]
format = "nist"
[time.clock]
listen = ["127.0.0.1:6791"]
[metrics]
END
}

warns_that_the_clock_state_is_unknown() {
    configure_clocks
    systemctl start handout
    ask 127.0.0.1 6789 | jq -e '.synchronized == false and ."max-error-us" == null'
    ask 127.0.0.1 6790 | grep -Eq ' [0-9]+ [0-9] 3 .*UTC\(NIST\) \*'
    ask 127.0.0.1 6791 | is_time
    refused grep -q '^handout_clock_max_error_seconds ' <<<"$(get /metrics)"
    refused grep -q '^handout_clock_synchronized ' <<<"$(get /metrics)"
    local warned
    warned=$(journal -p warning | grep -c 'see clock-state.conf')
    echo "$warned warnings"
    [ "$warned" -eq 2 ]
}

reports_the_clock_state_with_its_drop_in() {
    shipped_drop_in clock-state.conf
    configure_clocks
    systemctl start handout
    local told expected digit
    told=$(ask 127.0.0.1 6789) expected=$(clock_is_synchronized)
    echo "$told, expected $expected"
    jq -e ".synchronized == $expected and (.\"max-error-us\" | type) == \"number\"" <<<"$told"
    digit=$(ask 127.0.0.1 6790 | awk 'NF { print $6 }')
    if [ "$expected" = true ]; then [ "$digit" = 0 ]; else [ "$digit" != 0 ]; fi
    local metrics flag=0
    [ "$expected" = false ] || flag=1
    metrics=$(get /metrics)
    grep -q '^handout_clock_max_error_seconds [0-9]' <<<"$metrics"
    grep -Exq "handout_clock_synchronized $flag(\.0)?" <<<"$metrics"
    refused grep -q clock-state.conf <<<"$(journal -p warning)"
    # Reading the clock state requires no capability.
    refused grep -q '[1-9a-f]' <<<"$(sed -n 's/^CapEff:\t//p' "/proc/$(pid)/status")"
}

serves_files_of_a_supplementary_group() {
    mkdir -p /srv/group
    groupadd -f readers
    echo secret >/srv/group/file
    chgrp -R readers /srv/group
    chmod 750 /srv/group
    chmod 640 /srv/group/file
    printf '[file.group]\npath = "/srv/group/file"\n' >"$CONFIG"
    refused systemctl start handout
    systemctl reset-failed
    drop_in handout.service <<<$'[Service]\nSupplementaryGroups=readers'
    systemctl start handout
    [ "$(ask 127.0.0.1 5566 | jq -r .filedata | base64 -d)" = secret ]
}

serves_a_folder_and_nothing_outside() {
    mkdir -p /srv/folder/sub
    echo hello >/srv/folder/sub/file
    echo secret >/srv/outside
    ln -sf sub/file /srv/folder/link
    ln -sf ../outside /srv/folder/out
    ln -sf /srv/outside /srv/folder/absolute
    printf '[file.folder]\npath = "/srv/folder"\n' >"$CONFIG"
    systemctl start handout
    [ "$(get_line sub/file | jq -r .filedata | base64 -d)" = hello ]
    [ "$(get_line link | jq -r .filedata | base64 -d)" = hello ]
    for name in out absolute ../outside; do
        get_line "$name" | jq -e '.error == "no such file"'
    done
    get_line '' | jq -e '[.files[].filename] == ["link", "sub/file"]'
    # openat2(2) is refused by the sandbox, so the fallback serves.
    within 5 strace_sees_a_refusal
}

get_line() { echo "$1" | nc -N -w 5 127.0.0.1 5566; }

strace_sees_a_refusal() {
    timeout 1 strace -f -o /run/calls -e trace=openat2 -p "$(pid)" &
    sleep 0.5
    get_line link >/dev/null
    wait $! || true
    grep -E 'openat2\(.* = -1 (ENOSYS|EPERM) ' /run/calls
}

writes_fields_to_the_journal() {
    systemctl start handout
    ask 127.0.0.1 5566 >/dev/null
    connection_is_logged() {
        journal -o json SERVICE=file.picture OUTCOME=complete | jq -se '.[-1] |
            .PRIORITY == "6" and (.BYTES | tonumber) > 200000 and .DURATION
            and (.PEER | startswith("127.0.0.1:")) and (.MESSAGE | startswith("file.picture: "))
            and .SYSLOG_IDENTIFIER == "handout"' >/dev/null
    }
    within 5 connection_is_logged
    echo '[time.clock]' >"$CONFIG"
    echo junk >>"$CONFIG"
    kill -HUP "$(pid)"
    fault_is_logged() { journal -o json -p err | jq -se '.[-1].MESSAGE | contains("nothing was changed")'; }
    within 5 fault_is_logged
}

gives_mirrors_a_state_folder() {
    # Mirrors the metrics of the service itself, so no other server is needed.
    cat >"$CONFIG" <<END
[mirror.own]
urls = ["http://127.0.0.1:9467/healthz"]
into = "/var/lib/handout/own"
every = "1s"
retries = 0
[metrics]
listen = ["127.0.0.1:9467"]
END
    systemctl start handout
    within 5 grep -qx ok /var/lib/handout/own/healthz
    # The folder remains after the service stops.
    systemctl stop handout
    grep -qx ok /var/lib/handout/own/healthz
}

# Prints the first code block of README.md that begins with $1.
of_the_readme() { sed -n "/^## Mirrors/,\$p" /root/README.md | sed -n "/^\`\`\`$1\$/,/^\`\`\`\$/p" | sed -n '2,/^```$/p' | sed '/^```$/,$d'; }

# The servers run in the guest, and the system trusts their certificate.
runs_the_mirror_of_the_readme() {
    rm -rf /run/web && mkdir -p /run/web
    of_the_readme json >/run/web/pictures.json
    for file in 8f3a.jpg b.png; do echo "$file" >"/run/web/$file"; done
    python3 /root/web.py >/dev/null 2>&1 &
    # shellcheck disable=SC2064
    trap "kill $!; sed -i '/example.org/d' /etc/hosts; rm -f /etc/ssl/certs/ca-certificates.crt" EXIT
    echo '127.0.0.1 api.example.org cdn.example.org' >>/etc/hosts
    mkdir -p /etc/ssl/certs
    cp /root/web.pem /etc/ssl/certs/ca-certificates.crt
    within 10 nc -z 127.0.0.1 443
    of_the_readme toml >"$CONFIG"
    printf '[metrics]\n' >>"$CONFIG"
    handout check
    systemctl start handout
    # Immediately, while the folder may be empty.
    grep -q '^HTTP/1.1 200 ' <<<"$(get /healthz)"
    get_line '' | jq -e .files
    both_are_there() { get_line '' | jq -e '[.files[].filename] == ["guido.jpg", "北京.png"]'; }
    within 10 both_are_there
    [ "$(get_line guido.jpg | jq -r .filedata | base64 -d)" = 8f3a.jpg ]
    [ -z "$(journal -p warning)" ] || { journal -p warning; return 1; }
    systemctl reload handout
}

# Uncomments every default and creates the secrets and certificates that they name.
runs_with_the_commented_defaults() {
    local file secrets=(token mail.password sms.password)
    # shellcheck disable=SC2064
    trap "rm -f /etc/handout/ca.pem ${secrets[*]/#//etc/handout/}" EXIT
    { echo '[Service]'; printf 'LoadCredential=%s:/etc/handout/%s\n' token token mail.password mail.password sms.password sms.password; } |
        drop_in handout.service
    for file in "${secrets[@]}"; do
        echo secret >"/etc/handout/$file"
        chmod 600 "/etc/handout/$file"
    done
    cp /root/web.pem /etc/handout/ca.pem
    chmod 644 /etc/handout/ca.pem
    sed -i 's/^#\([^ ]\)/\1/' "$CONFIG"
    # The comments are tables and keys now.
    grep -q '^into  *= "/var/lib/handout/' "$CONFIG" && grep -q '^state  *= ' "$CONFIG"
    systemctl start handout
    systemctl reload handout
    # Each table alone: a faulty key must not be hidden by another.
    [ -d /var/lib/handout/pictures ]
    refused reload_failed .
}

serves_metrics() {
    systemctl start handout
    get /healthz | grep -q '^HTTP/1.1 200 '
    grep -Exq 'handout_service_healthy\{service="time.clock"\} 1(\.0)?' <<<"$(get /metrics)"
}
