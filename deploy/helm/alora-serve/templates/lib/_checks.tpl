{{/* What is refused because it would render, and fail in the cluster. Each takes the root context. */}}

{{- define "alora-serve.checkStore" -}}
{{- $store := .Values.store -}}
{{- if eq $store.type "external" -}}
{{- if $store.external.urlSecret.name -}}
{{- if $store.password -}}
{{- fail "store.password is not put into store.external.urlSecret: write the password into that URL, and leave store.password false" -}}
{{- end -}}
{{- else -}}
{{- $url := $store.external.url -}}
{{- if and $store.password (not (contains "$(STORE_PASSWORD)" $url)) -}}
{{- fail "store.password needs its place in store.external.url: redis://:$(STORE_PASSWORD)@host:6379/0" -}}
{{- end -}}
{{- if and (or $store.tls.caSecret $store.tls.clientSecret) (not (hasPrefix "rediss" $url)) -}}
{{- fail "store.tls needs a store.external.url that begins with rediss: redis is plain text" -}}
{{- end -}}
{{- end -}}
{{- else if eq $store.type "lmdb" -}}
{{- if or $store.tls.caSecret $store.tls.clientSecret -}}
{{- fail "store.tls is for store.type external: lmdb is files, which nobody connects to" -}}
{{- end -}}
{{- if eq $store.lmdb.medium "Cache" -}}
{{- /* Pages are copied before they are freed, and nothing else keeps the file within the volume. */ -}}
{{- $size := include "alora-serve.bytes" $store.lmdb.size | int64 -}}
{{- if gt (mul 10 $size) (mul 7 (include "alora-serve.bytes" .Values.cache.size | int64)) -}}
{{- $problem := "store.lmdb.size, %s, must be at most seven tenths of cache.size, %s, which must hold fetched models besides" -}}
{{- fail (printf $problem $store.lmdb.size .Values.cache.size) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* With tls.clientCaSecret the router takes nobody without a certificate. The front door has a check of its own. */}}
{{- define "alora-serve.checkClientCertificates" -}}
{{- if and .Values.tls.enabled .Values.tls.clientCaSecret -}}
{{- if and .Values.tests.enabled (not .Values.tests.clientSecret) -}}
{{- fail "tls.clientCaSecret needs tests.clientSecret, or tests.enabled=false: the router takes nobody without a certificate" -}}
{{- end -}}
{{- $shown := "nginx.ingress.kubernetes.io/proxy-ssl-secret" -}}
{{- if and .Values.ingress.enabled (not (hasKey (.Values.ingress.annotations | default dict) $shown)) -}}
{{- fail (printf "tls.clientCaSecret needs ingress.annotations with %s: the router takes nobody without a certificate" $shown) -}}
{{- end -}}
{{- if .Values.gateway.enabled -}}
{{- fail "tls.clientCaSecret and gateway.enabled exclude each other: no route of the chart's shows the router a certificate; have the gateway ask clients for theirs" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "alora-serve.checkAdapters" -}}
{{- $seen := dict -}}
{{- range .Values.adapters -}}
{{- $volume := .name | lower | replace "." "-" -}}
{{- if hasKey $seen $volume -}}
{{- fail (printf "adapters %s and %s would both be the volume adapters-%s: rename one" (get $seen $volume) .name $volume) -}}
{{- end -}}
{{- $_ := set $seen $volume .name -}}
{{- end -}}
{{- end }}

{{- define "alora-serve.checkReplicas" -}}
{{- range $name := list "router" "basePrefill" "adapterDecode" "openaiFront" -}}
{{- $scale := (index $.Values $name).autoscaling -}}
{{- if and $scale.enabled (gt (int $scale.minReplicas) (int $scale.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas, %d, is more than maxReplicas, %d" $name (int $scale.minReplicas) (int $scale.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
A cluster that has the Gateway API, but not this kind of it. One that is not asked (helm template) has neither.
*/}}
{{- define "alora-serve.checkBackendTls" -}}
{{- $group := "gateway.networking.k8s.io/v1" -}}
{{- $versions := .Capabilities.APIVersions -}}
{{- if and ($versions.Has $group) (not ($versions.Has (printf "%s/BackendTLSPolicy" $group))) -}}
{{- fail "with tls.enabled, routes need BackendTLSPolicy of gateway.networking.k8s.io/v1, which Gateway API 1.4 brings" -}}
{{- end -}}
{{- end }}
