{{/*
The environment of a service. Every ALORA_* name is a setting of shared/alora_serve/config/groups.py (or ALORA_CACHE_DIR);
a test compares them. A setting that changes changes the pod template, and so replaces the pods.
*/}}
{{- define "alora-serve.env" -}}
{{- $values := .ctx.Values -}}
{{- $isModelService := include "alora-serve.isModelService" . -}}
{{- $isFront := include "alora-serve.isFront" . -}}
{{- $settings := include "alora-serve.settings" . | fromJson -}}
- {name: ALORA_LISTEN, value: "{{ $values.listenHost }}:{{ include "alora-serve.port" . }}"}
- {name: ALORA_HEALTH_LISTEN, value: "{{ $values.listenHost }}:50052"}
- {name: ALORA_METRICS_LISTEN, value: "{{ $values.listenHost }}:9090"}
- {name: ALORA_DRAIN_SECONDS, value: {{ .values.drainSeconds | toString | quote }}}
{{- if $values.tls.enabled }}
- {name: ALORA_TLS_CERT_FILE, value: /etc/alora-serve/tls/tls.crt}
- {name: ALORA_TLS_KEY_FILE, value: /etc/alora-serve/tls/tls.key}
{{- if and $isModelService $values.tls.mutual }}
- {name: ALORA_TLS_CLIENT_CA_FILE, value: /etc/alora-serve/tls/ca.crt}
{{- else if and (not (or $isModelService $isFront)) $values.tls.clientCaSecret }}
- {name: ALORA_TLS_CLIENT_CA_FILE, value: /etc/alora-serve/client-ca/ca.crt}
{{- end }}
{{- else }}
- {name: ALORA_ALLOW_INSECURE, value: "true"}
{{- end }}
{{- if $isFront }}
{{- include "alora-serve.frontEnv" . | nindent 0 }}
{{- else }}
{{- $handle := dict "ctx" .ctx "name" "ALORA_HANDLE_SECRETS" "key" "handle-secrets" }}
{{- include "alora-serve.secretEnv" $handle | nindent 0 }}
{{- $optional := not (include "alora-serve.hasTenants" .ctx) }}
{{- $salt := dict "ctx" .ctx "name" "ALORA_TENANT_SALT" "key" "tenant-salt" "optional" $optional }}
{{- include "alora-serve.secretEnv" $salt | nindent 0 }}
{{- if $values.publicPrompts }}
- {name: ALORA_PUBLIC_PROMPTS_FILE, value: /etc/alora-serve/public-prompts/public-prompts.yaml}
{{- end }}
{{- end }}
{{- if $isModelService }}
{{- include "alora-serve.modelEnv" . | nindent 0 }}
{{- include "alora-serve.storeEnv" .ctx | nindent 0 }}
{{- if not (hasKey $settings "threads") }}
- name: ALORA_THREADS
  valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: "1"}}
{{- end }}
{{- else if not $isFront }}
{{- include "alora-serve.routerEnv" .ctx | nindent 0 }}
{{- end }}
{{- range $name, $value := $settings }}
- {name: ALORA_{{ upper $name }}, value: {{ include "alora-serve.settingValue" $value | quote }}}
{{- end }}
{{- with include "alora-serve.tracingEnv" .ctx }}
{{- . | nindent 0 }}
{{- end }}
{{- with .values.extraEnv }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{/* Where traces go, in OpenTelemetry's own variables; services name themselves. */}}
{{- define "alora-serve.tracingEnv" -}}
{{- with .Values.tracing }}
{{- if .endpoint -}}
{{- $own := list "k8s.pod.name=$(POD_NAME)" (printf "k8s.namespace.name=%s" $.Release.Namespace) -}}
{{- $own = append $own (printf "service.namespace=%s" (include "alora-serve.fullname" $)) -}}
{{- range $name, $value := .resourceAttributes }}
{{- $own = append $own (printf "%s=%s" $name (urlquery $value | replace "+" "%20")) -}}
{{- end -}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .endpoint | quote }}}
- {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .sampleRatio | toString | quote }}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: {{ join "," $own | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* A variable from the services' secret. */}}
{{- define "alora-serve.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ include "alora-serve.secretName" .ctx }}
      key: {{ .key }}
      {{- if .optional }}
      optional: true
      {{- end }}
{{- end }}

{{- define "alora-serve.modelEnv" -}}
{{- $values := .ctx.Values -}}
- {name: ALORA_CACHE_DIR, value: /var/cache/alora-serve}
{{- if include "alora-serve.digestsAreKept" . }}
- {name: ALORA_DIGEST_CACHE_DIR, value: /var/cache/alora-serve-digests}
{{- else if not (include "alora-serve.cacheIsWritten" .ctx) }}
- {name: ALORA_DIGEST_CACHE_DIR, value: /tmp/digests} # outlives the container, not the pod
{{- end }}
# What is not in a volume is not fetched behind anyone's back: only an init container that was asked for downloads.
- {name: HF_HUB_OFFLINE, value: "1"}
{{- $model := dict "folder" "models" "item" $values.model }}
- {name: ALORA_MODEL, value: {{ include "alora-serve.sourcePath" $model | quote }}}
- {name: ALORA_DTYPE, value: {{ $values.dtype }}}
- {name: ALORA_DEVICE, value: {{ $values.gpu.enabled | ternary "cuda" "cpu" }}}
{{- if eq .component "adapter-decode" }}
- {name: ALORA_ADAPTER_ROOTS, value: {{ include "alora-serve.adapterRoots" .ctx | quote }}}
{{- end }}
{{- end }}

{{- define "alora-serve.storeEnv" -}}
{{- $store := .Values.store -}}
{{- if $store.password }}
{{- include "alora-serve.secretEnv" (dict "ctx" . "name" "STORE_PASSWORD" "key" "store-password") }}
{{ end -}}
{{- if eq $store.type "lmdb" -}}
{{- $place := eq $store.lmdb.medium "Memory" | ternary "" "///var/cache/alora-serve/store" }}
- {name: ALORA_STORE_URL, value: "lmdb:{{ $place }}"}
- {name: ALORA_STORE_BUDGET_BYTES, value: {{ include "alora-serve.bytes" $store.lmdb.size | quote }}}
{{- else if eq $store.type "valkey" -}}
{{- $scheme := include "alora-serve.storeTls" . | empty | ternary "redis" "rediss" -}}
{{- $login := $store.password | ternary ":$(STORE_PASSWORD)@" "" -}}
{{- $host := include "alora-serve.name" (dict "ctx" . "component" "store") -}}
- {name: ALORA_STORE_URL, value: "{{ $scheme }}://{{ $login }}{{ $host }}:6379/0"}
{{- else if $store.external.urlSecret.name -}}
- name: ALORA_STORE_URL
  valueFrom: {secretKeyRef: {name: {{ $store.external.urlSecret.name }}, key: {{ $store.external.urlSecret.key }}}}
{{- else -}}
{{- $needed := "store.type external needs store.external.url or store.external.urlSecret.name" -}}
- {name: ALORA_STORE_URL, value: {{ required $needed $store.external.url | quote }}}
{{- end }}
{{- if include "alora-serve.storeTls" . }}
{{- if eq $store.type "valkey" }}
- {name: ALORA_STORE_TLS_CA_FILE, value: /etc/alora-serve/tls/ca.crt}
{{- if .Values.tls.mutual }}
- {name: ALORA_STORE_TLS_CERT_FILE, value: /etc/alora-serve/tls/tls.crt}
- {name: ALORA_STORE_TLS_KEY_FILE, value: /etc/alora-serve/tls/tls.key}
{{- end }}
{{- else }}
{{- if $store.tls.caSecret }}
- {name: ALORA_STORE_TLS_CA_FILE, value: /etc/alora-serve/store-ca/ca.crt}
{{- end }}
{{- if $store.tls.clientSecret }}
- {name: ALORA_STORE_TLS_CERT_FILE, value: /etc/alora-serve/store-client/tls.crt}
- {name: ALORA_STORE_TLS_KEY_FILE, value: /etc/alora-serve/store-client/tls.key}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $store.type "external") (not $store.tls.checkHostname) }}
- {name: ALORA_STORE_TLS_CHECK_HOSTNAME, value: "false"}
{{- end }}
- {name: ALORA_STORE_PROTECTION, value: {{ $store.protection }}}
{{- if ne $store.protection "none" }}
{{- include "alora-serve.secretEnv" (dict "ctx" . "name" "ALORA_STORE_SECRETS" "key" "store-secrets") | nindent 0 }}
{{- end }}
{{- end }}

{{- define "alora-serve.frontEnv" -}}
{{- $router := include "alora-serve.name" (dict "ctx" .ctx "component" "router") -}}
# The name of every router, so that calls are shared among them.
- {name: ALORA_ROUTER_ADDRESS, value: "dns:///{{ $router }}-headless:50051"}
{{- if .ctx.Values.tls.enabled }}
- {name: ALORA_ROUTER_TLS_CA_FILE, value: /etc/alora-serve/router-ca/ca.crt}
- {name: ALORA_ROUTER_TLS_SERVER_NAME, value: {{ include "alora-serve.routerServerName" .ctx | default $router | quote }}}
{{- if .values.routerClientSecret }}
- {name: ALORA_ROUTER_TLS_CERT_FILE, value: /etc/alora-serve/router-client/tls.crt}
- {name: ALORA_ROUTER_TLS_KEY_FILE, value: /etc/alora-serve/router-client/tls.key}
{{- else if .ctx.Values.tls.clientCaSecret }}
{{- fail "tls.clientCaSecret needs openaiFront.routerClientSecret: the router takes nobody without a certificate" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "alora-serve.routerEnv" -}}
{{- $prefill := include "alora-serve.name" (dict "ctx" . "component" "base-prefill") -}}
{{- $decode := include "alora-serve.name" (dict "ctx" . "component" "adapter-decode") -}}
- {name: ALORA_BASE_PREFILL_ENDPOINTS, value: "dns:///{{ $prefill }}:50051"}
- {name: ALORA_DECODE_ENDPOINTS, value: "dns:///{{ $decode }}:50051"}
{{- if .Values.tls.enabled }}
- {name: ALORA_PEER_TLS_CA_FILE, value: /etc/alora-serve/peer-tls/ca.crt}
{{- if .Values.tls.mutual }}
- {name: ALORA_PEER_TLS_CERT_FILE, value: /etc/alora-serve/peer-tls/tls.crt}
- {name: ALORA_PEER_TLS_KEY_FILE, value: /etc/alora-serve/peer-tls/tls.key}
{{- end }}
- {name: ALORA_PEER_TLS_SERVER_NAME, value: {{ include "alora-serve.peerServerName" . }}}
{{- end }}
{{- if .Values.access.fileSecret }}
- {name: ALORA_ACCESS_FILE, value: /etc/alora-serve/access/access.yaml}
{{- end }}
{{- with .Values.access.jwt }}
{{- if .jwksConfigMap }}
- {name: ALORA_JWKS_FILE, value: /etc/alora-serve/jwks/jwks.json}
- {name: ALORA_JWT_ISSUER, value: {{ required "access.jwt.jwksConfigMap needs access.jwt.issuer" .issuer | quote }}}
- {name: ALORA_JWT_AUDIENCE, value: {{ required "access.jwt.jwksConfigMap needs access.jwt.audience" .audience | quote }}}
- {name: ALORA_JWT_TENANT_CLAIM, value: {{ .tenantClaim | quote }}}
- {name: ALORA_JWT_ROLES_CLAIM, value: {{ .rolesClaim | quote }}}
{{- end }}
{{- end }}
{{- end }}
