{{/*
Names and small values. What is about one component takes
(dict "ctx" $ "component" "base-prefill" "values" .Values.basePrefill), all else the root context.
*/}}

{{- define "alora-serve.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- $full = .Values.fullnameOverride | default $full -}}
{{- /* 63 are left for -adapter-decode and the hash that a StatefulSet's pods have as a label; for keda-hpa- before it. */ -}}
{{- $full | trunc 37 | trimSuffix "-" -}}
{{- end }}

{{- define "alora-serve.name" -}}
{{- printf "%s-%s" (include "alora-serve.fullname" .ctx) .component -}}
{{- end }}

{{- define "alora-serve.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/part-of: alora-serve
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "alora-serve.releaseLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "alora-serve.selectorLabels" -}}
{{ include "alora-serve.releaseLabels" .ctx }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "alora-serve.labels" -}}
{{ include "alora-serve.selectorLabels" . }}
{{ include "alora-serve.commonLabels" .ctx }}
{{- end }}

{{/* Of an object that belongs to no component. */}}
{{- define "alora-serve.plainLabels" -}}
{{ include "alora-serve.releaseLabels" . }}
{{ include "alora-serve.commonLabels" . }}
{{- end }}

{{/* The whole name of an image. (dict "ctx" $ "image" .Values.x.image) */}}
{{- define "alora-serve.image" -}}
{{- $registry := .ctx.Values.global.imageRegistry | default .image.registry -}}
{{- $tag := .image.tag | default .ctx.Chart.AppVersion -}}
{{- printf "%s/%s" (trimSuffix "/" $registry) .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end }}

{{- define "alora-serve.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "alora-serve.fullname" .) -}}
{{- end }}

{{/* Where the services' secrets are: the secret that was named, or the one of the values given. */}}
{{- define "alora-serve.secretName" -}}
{{- $own := printf "%s-secrets" (include "alora-serve.fullname" .) -}}
{{- if not (or .Values.secrets.existingSecret .Values.secrets.handleSecrets) -}}
{{- fail (printf (include "alora-serve.secretHelp" .) $own .Release.Namespace $own) -}}
{{- end -}}
{{- .Values.secrets.existingSecret | default $own -}}
{{- end }}

{{- define "alora-serve.secretHelp" }}

The services need secrets that stay the same, so the chart makes none. Make them once:

  kubectl create secret generic %s --namespace %s \
    --from-literal=handle-secrets="$(openssl rand -hex 24)" \
    --from-literal=tenant-salt="$(openssl rand -hex 24)" \
    --from-literal=store-secrets="$(openssl rand -hex 24)" \
    --from-literal=store-password="$(openssl rand -hex 24)"

and name them: --set secrets.existingSecret=%s
{{ end }}

{{/* A setting as a variable's value: numbers without exponents, lists with commas. */}}
{{- define "alora-serve.settingValue" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if kindIs "slice" . }}{{ join "," . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{/* A size such as 512Mi or 1.5Gi, or a number, in bytes. */}}
{{- define "alora-serve.bytes" -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 -}}
{{- $units = merge $units (dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776) -}}
{{- $size := kindIs "string" . | ternary (toString .) (printf "%.0f" (float64 .)) -}}
{{- $number := regexFind "^[0-9.]+" $size -}}
{{- mulf (float64 $number) (index $units (trimPrefix $number $size)) | int64 -}}
{{- end }}

{{/* Settings of a component: the release's, then its own. */}}
{{- define "alora-serve.settings" -}}
{{- $settings := dict -}}
{{- range $name, $value := .ctx.Values.settings }}{{ $_ := set $settings $name $value }}{{ end -}}
{{- range $name, $value := .values.settings }}{{ $_ := set $settings $name $value }}{{ end -}}
{{- toJson $settings -}}
{{- end }}

{{- define "alora-serve.isModelService" -}}
{{- if has .component (list "base-prefill" "adapter-decode") }}true{{ end -}}
{{- end }}

{{/* The HTTP front door needs none of the services' secrets: it calls the router alone. */}}
{{- define "alora-serve.isFront" -}}
{{- if eq .component "openai-front" }}true{{ end -}}
{{- end }}

{{/* Where it listens for callers. */}}
{{- define "alora-serve.port" -}}
{{ include "alora-serve.isFront" . | empty | ternary 50051 8000 }}
{{- end }}

{{/* "true" where callers show keys or tokens, and tenants are kept apart. */}}
{{- define "alora-serve.hasTenants" -}}
{{- if or .Values.access.fileSecret .Values.access.jwt.jwksConfigMap }}true{{ end -}}
{{- end }}

{{/* "true" where the services speak TLS to the store. */}}
{{- define "alora-serve.storeTls" -}}
{{- $tls := .Values.store.tls -}}
{{- if eq .Values.store.type "valkey" | ternary .Values.tls.enabled (or $tls.caSecret $tls.clientSecret) }}true{{ end -}}
{{- end }}

{{/* The name that certificates of both model services carry: the router connects to addresses, of either. */}}
{{- define "alora-serve.peerServerName" -}}
{{- .Values.tls.peerServerName | default (printf "%s-peers.%s.svc" (include "alora-serve.fullname" .) .Release.Namespace) -}}
{{- end }}

{{/*
The name that the router is verified by; empty: the one it is called by. What another issuer signs has no name of the
cluster, since public ones know none.
*/}}
{{- define "alora-serve.routerServerName" -}}
{{- $tls := .Values.tls -}}
{{- if $tls.enabled -}}
{{- if $tls.routerServerName -}}
{{- $tls.routerServerName -}}
{{- else if and $tls.certManager.enabled $tls.certManager.routerIssuerRef -}}
{{- $needed := "tls.certManager.routerIssuerRef needs tls.certManager.routerDnsNames: it signs no name of the cluster" -}}
{{- required $needed $tls.certManager.routerDnsNames | first -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The secret of a certificate. (dict "ctx" $ "certificate" "base-prefill") */}}
{{- define "alora-serve.tlsSecret" -}}
{{- $key := .certificate | replace "-" " " | title | nospace | untitle -}}
{{- $name := printf "%s-%s-tls" (include "alora-serve.fullname" .ctx) .certificate -}}
{{- $existing := index .ctx.Values.tls.existingSecrets $key -}}
{{- if not (or .ctx.Values.tls.certManager.enabled $existing) -}}
{{- fail (printf (include "alora-serve.certificateHelp" .) $name .ctx.Release.Namespace $key $name) -}}
{{- end -}}
{{- .ctx.Values.tls.certManager.enabled | ternary $name $existing -}}
{{- end }}

{{- define "alora-serve.certificateHelp" }}

tls.enabled needs tls.certManager.enabled, or a secret of each certificate. Make this one:

  kubectl create secret generic %s --namespace %s \
    --from-file=tls.crt --from-file=tls.key --from-file=ca.crt

and name it: --set tls.existingSecrets.%s=%s
{{ end }}
