{{/* Volumes of a service's pod, and where its container sees them: as folders, so that what is renewed arrives. */}}

{{/* A secret's keys that are files. (dict "volume" "tls" "secret" NAME "only" "ca.crt") */}}
{{- define "alora-serve.secretVolume" -}}
- name: {{ .volume }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 0440
    {{- with .only }}
    items: [{key: {{ . }}, path: {{ . }}}]
    {{- end }}
{{- end }}

{{- define "alora-serve.volumes" -}}
{{- $values := .ctx.Values -}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
{{- if $values.tls.enabled }}
{{- $secret := include "alora-serve.tlsSecret" (dict "ctx" .ctx "certificate" .component) }}
{{- include "alora-serve.secretVolume" (dict "volume" "tls" "secret" $secret) | nindent 0 }}
{{- end }}
{{- if and $values.publicPrompts (not (include "alora-serve.isFront" .)) }}
- {name: public-prompts, configMap: {name: {{ include "alora-serve.fullname" .ctx }}-public-prompts}}
{{- end }}
{{- if include "alora-serve.isModelService" . }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ include "alora-serve.shmSize" . }}}
{{- if ne .values.kind "StatefulSet" }}
- {name: cache, emptyDir: {sizeLimit: {{ $values.cache.size }}}}
{{- end }}
{{- include "alora-serve.sourceVolumes" . }}
{{- if eq $values.store.type "external" }}
{{- with $values.store.tls.caSecret }}
{{- include "alora-serve.secretVolume" (dict "volume" "store-ca" "secret" . "only" "ca.crt") | nindent 0 }}
{{- end }}
{{- with $values.store.tls.clientSecret }}
{{- include "alora-serve.secretVolume" (dict "volume" "store-client" "secret" .) | nindent 0 }}
{{- end }}
{{- end }}
{{- else if include "alora-serve.isFront" . }}
{{- if $values.tls.enabled }}
{{- $secret := .values.routerCaSecret | default (include "alora-serve.tlsSecret" (dict "ctx" .ctx "certificate" "router")) }}
{{- include "alora-serve.secretVolume" (dict "volume" "router-ca" "secret" $secret "only" "ca.crt") | nindent 0 }}
{{- with .values.routerClientSecret }}
{{- include "alora-serve.secretVolume" (dict "volume" "router-client" "secret" .) | nindent 0 }}
{{- end }}
{{- end }}
{{- else }}
{{- if $values.tls.enabled }}
{{- $secret := include "alora-serve.tlsSecret" (dict "ctx" .ctx "certificate" "router-peer") }}
{{- include "alora-serve.secretVolume" (dict "volume" "peer-tls" "secret" $secret) | nindent 0 }}
{{- with $values.tls.clientCaSecret }}
{{- include "alora-serve.secretVolume" (dict "volume" "client-ca" "secret" . "only" "ca.crt") | nindent 0 }}
{{- end }}
{{- end }}
{{- with $values.access.fileSecret }}
{{- include "alora-serve.secretVolume" (dict "volume" "access" "secret" .) | nindent 0 }}
{{- end }}
{{- with $values.access.jwt.jwksConfigMap }}
- {name: jwks, configMap: {name: {{ . }}}}
{{- end }}
{{- end }}
{{- with .values.extraVolumes }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{- define "alora-serve.volumeMounts" -}}
{{- $values := .ctx.Values -}}
- {name: tmp, mountPath: /tmp}
{{- if $values.tls.enabled }}
- {name: tls, mountPath: /etc/alora-serve/tls, readOnly: true}
{{- end }}
{{- if and $values.publicPrompts (not (include "alora-serve.isFront" .)) }}
- {name: public-prompts, mountPath: /etc/alora-serve/public-prompts, readOnly: true}
{{- end }}
{{- if include "alora-serve.isModelService" . }}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /var/cache/alora-serve{{ if not (include "alora-serve.cacheIsWritten" .ctx) }}, readOnly: true{{ end }}}
{{- if include "alora-serve.digestsAreKept" . }}
- {name: cache, mountPath: /var/cache/alora-serve-digests, subPath: digests}
{{- end }}
{{- include "alora-serve.sourceMounts" . }}
{{- if eq $values.store.type "external" }}
{{- if $values.store.tls.caSecret }}
- {name: store-ca, mountPath: /etc/alora-serve/store-ca, readOnly: true}
{{- end }}
{{- if $values.store.tls.clientSecret }}
- {name: store-client, mountPath: /etc/alora-serve/store-client, readOnly: true}
{{- end }}
{{- end }}
{{- else if include "alora-serve.isFront" . }}
{{- if $values.tls.enabled }}
- {name: router-ca, mountPath: /etc/alora-serve/router-ca, readOnly: true}
{{- if .values.routerClientSecret }}
- {name: router-client, mountPath: /etc/alora-serve/router-client, readOnly: true}
{{- end }}
{{- end }}
{{- else }}
{{- if $values.tls.enabled }}
- {name: peer-tls, mountPath: /etc/alora-serve/peer-tls, readOnly: true}
{{- if $values.tls.clientCaSecret }}
- {name: client-ca, mountPath: /etc/alora-serve/client-ca, readOnly: true}
{{- end }}
{{- end }}
{{- if $values.access.fileSecret }}
- {name: access, mountPath: /etc/alora-serve/access, readOnly: true}
{{- end }}
{{- if $values.access.jwt.jwksConfigMap }}
- {name: jwks, mountPath: /etc/alora-serve/jwks, readOnly: true}
{{- end }}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{/* /dev/shm is memory of the pod: a limit that cannot hold it would end in an out-of-memory kill once it fills. */}}
{{- define "alora-serve.shmSize" -}}
{{- $store := .ctx.Values.store -}}
{{- $isStore := and (eq $store.type "lmdb") (eq $store.lmdb.medium "Memory") -}}
{{- $size := $isStore | ternary $store.lmdb.size .ctx.Values.shmSize -}}
{{- $limit := dig "limits" "memory" "" .values.resources -}}
{{- if and $limit (le (include "alora-serve.bytes" $limit | int64) (include "alora-serve.bytes" $size | int64)) -}}
{{- fail (printf "the memory limit of %s, %s, must hold /dev/shm, %s, and the process besides" .component $limit $size) -}}
{{- end -}}
{{- $size -}}
{{- end }}

{{/* A limit that Valkey's KV fills would end in the same kill: buffers, connections and fragmentation take a fifth. */}}
{{- define "alora-serve.valkeyMemory" -}}
{{- $size := .maxmemory | trimSuffix "b" | upper | printf "%si" | include "alora-serve.bytes" | int64 -}}
{{- $limit := dig "limits" "memory" "" .resources -}}
{{- if and $limit (gt (mul 5 $size) (mul 4 (include "alora-serve.bytes" $limit | int64))) -}}
{{- $problem := "store.valkey.maxmemory, %s, must be at most four fifths of the store's memory limit, %v" -}}
{{- fail (printf $problem .maxmemory $limit) -}}
{{- end -}}
{{- .maxmemory -}}
{{- end }}

{{/* Whether model services write into their cache volume: where the store lies there. */}}
{{- define "alora-serve.cacheIsWritten" -}}
{{- if and (eq .Values.store.type "lmdb") (eq .Values.store.lmdb.medium "Cache") }}true{{ end }}
{{- end }}

{{/* Whether digests of weights have a folder of their own in a StatefulSet's claim, the rest of which is read-only. */}}
{{- define "alora-serve.digestsAreKept" -}}
{{- if and (eq .values.kind "StatefulSet") (not (include "alora-serve.cacheIsWritten" .ctx)) }}true{{ end }}
{{- end }}
